"""The daemon: running it in the foreground, asking after it, ending it."""

from __future__ import annotations

import os
import select
import signal
import time

from undercroft.cli.command import Command, Namespace, Parser
from undercroft.cli.errors import NO_DAEMON, OK, UsageError, ours
from undercroft.cli.output import dig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft

_END_LIMIT = 30.0  # seconds for a daemon to end


class Daemon(Command):
    """``croft daemon``"""

    description = """
        Runs the daemon of a data directory in the foreground, until Ctrl-C. You need this only to
        serve the network (--listen) or under a supervisor: croft starts a daemon in the background
        whenever none answers. VMs are not the daemon's children: they run on when it ends, and it
        finds them again when it comes back.

        With --listen it also serves HTTPS, for callers with a token (croft token create).
    """
    examples = (
        ("croft daemon", "in the foreground"),
        ("croft daemon --listen 127.0.0.1:8773", "also over the network"),
        ("croft daemon --data ~/lab", "another, with VMs of its own"),
        ("croft daemon status", "does one run?"),
        ("croft daemon restart", "after an upgrade; VMs run on"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "what",
            nargs="?",
            choices=("run", "status", "stop", "restart"),
            default="run",
            metavar="run|status|stop|restart",
            help="(default: run)",
        )
        parser.add_argument("--listen", metavar="ADDR:PORT", help="also serve the network")

    def run(self, croft: Croft, args: Namespace) -> int:
        if args.listen is not None and args.what != "run":
            raise UsageError(f"--listen does not go with croft daemon {args.what}")
        if croft.url is not None and args.what != "status":
            raise UsageError(
                "a daemon elsewhere is not run from here", "leave out --url, unset CROFT_URL"
            )
        if args.what == "run":
            from pathlib import Path

            from undercroft.api.daemon import run_daemon

            run_daemon(Path(croft.data), args.listen)
            return OK
        if args.what == "status":
            return _status(croft)
        running = _stop(croft)
        if args.what == "stop":
            return OK
        if not running:
            croft.note("it did not run")
        croft.connect()
        return OK


def _find(croft: Croft) -> Any:
    """What the daemon says of itself; None if there is none."""
    try:
        return croft.connect(start=False).get("/v1")
    except Exception as error:
        known = ours(error)
        if known is None or known.code != "daemon":
            raise
        return None


def _status(croft: Croft) -> int:
    info = _find(croft)
    where = croft.url or croft.data
    if info is None:
        if croft.json:
            croft.print_json({"running": False, "data": croft.data})
        croft.say(f"no daemon runs for {where}; croft starts one when it is needed")
        return NO_DAEMON
    if croft.json:
        croft.print_json({"running": True, **info})
        return OK
    api = croft.connect(start=False)
    vms = list(api.list("/v1/vms", {"fields": "status.state"}))
    running = sum(dig(vm, "status.state") == "running" for vm in vms)
    state = croft.out.state("running")
    croft.say(
        f"the daemon for {info.get('data', where)} is {state} "
        f"(pid {info.get('pid')}, version {info.get('version')})"
    )
    croft.say(f"  {len(vms)} VMs, {running} of them running")
    if croft.url is None:
        croft.say(f"  log  {os.path.join(croft.data, 'daemon.log')}")
    return OK


def _stop(croft: Croft) -> bool:
    """Ends the daemon; False if none ran.

    Raises:
        TimeLimitError: it does not end.
    """
    info = _find(croft)
    if info is None:
        croft.say(f"no daemon runs for {croft.data}")
        return False
    from undercroft.model.errors import ForbiddenError, TimeLimitError

    pid = int(info["pid"])
    try:
        # A descriptor of the process: its number may be somebody else's a moment later.
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        begun = time.monotonic()
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if not poll.poll(_END_LIMIT * 1000):
            raise TimeLimitError(
                f"the daemon (pid {pid}) has not ended in {time.monotonic() - begun:.0f} seconds",
                action=f"see {os.path.join(croft.data, 'daemon.log')}",
            )
    except PermissionError:
        raise ForbiddenError(
            f"the daemon (pid {pid}) is not yours to end", action="become the user it runs as"
        ) from None
    except ProcessLookupError:
        pass
    finally:
        os.close(process)
    croft.say(f"the daemon for {croft.data} has ended (pid {pid}); its VMs run on")
    return True
