"""A shell in a guest: through SSH where it is served, else on the serial console."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time

from undercroft.cli.command import Command, Namespace, Parser, add_names, duration
from undercroft.cli.errors import FAILED, UsageError, tell
from undercroft.cli.output import dig
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft

_PATIENCE = 90.0  # seconds for a guest that is still booting
_STEP = 0.5


class Shell(Command):
    """``croft shell VM``"""

    description = """
        Opens a shell in the VM: through SSH if the guest serves it (with your key, or the one that
        croft made for you), else it connects you with the serial console, and says so. While the
        guest still boots it waits. What follows -- is run instead of a shell; its exit code is
        passed on.

        The VM's host key is remembered apart from your ~/.ssh/known_hosts, under the VM's identity.
    """
    examples = (
        ("croft shell web1", "log in"),
        ("croft shell web1 --user root", "as somebody else"),
        ("croft shell web1 -- systemctl status", "one command, with a terminal"),
        ("croft shell web1 --ssh '-A -L 5432:localhost:5432'", "with options for ssh"),
    )
    program = True

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("-u", "--user", help="account to log in to (default: the VM's)")
        parser.add_argument("--ssh", metavar="OPTIONS", default="", help="more options for ssh")
        parser.add_argument(
            "--wait",
            type=duration,
            default=_PATIENCE,
            metavar="TIME",
            help="for a guest that still boots (default: 90s)",
        )
        add_names(parser, plural=False)

    def run(self, croft: Croft, args: Namespace) -> int:
        vm = croft.api.get(f"/v1/vms/{quote(args.name)}")
        argv: list[str] = args.argv
        name, state = str(dig(vm, "meta.name")), str(dig(vm, "status.state"))
        if state != "running":
            from undercroft.model.errors import WrongStateError

            verb = "resume" if state in ("paused", "suspended") else "start"
            raise WrongStateError(
                f"vm {name} is {state}, not running", action=f"croft {verb} {name}"
            )
        forward = _ssh_port(croft, vm)
        if forward is None:
            return self._console(croft, name, argv)
        if shutil.which("ssh") is None:
            from undercroft.model.errors import MissingToolError

            raise MissingToolError(
                "ssh is not installed here",
                action=f"install it (openssh-client), or use: croft console {name}",
            )
        address = (str(forward.get("host_address", "127.0.0.1")), int(forward["host_port"]))
        if not _wait_for_banner(croft, name, address, args.wait):
            tell(
                croft,
                f"{name} does not answer to SSH at {address[0]}:{address[1]}",
                f"it may still be booting, or not serve it: croft console {name}",
            )
            return FAILED
        user = args.user or dig(vm, "spec.guest.user") or _image_user(croft, vm)
        command = _command(croft, vm, address, user, args.ssh, argv)
        sys.stdout.flush()
        croft.api.close()
        os.execvp(command[0], command)  # noqa: S606 - croft becomes ssh

    def _console(self, croft: Croft, name: str, argv: list[str]) -> int:
        if argv:
            raise UsageError(
                f"{name} is not reached through SSH, so its shell takes no command",
                f"croft exec {name} -- {' '.join(argv)}",
            )
        croft.note(f"{name} serves no SSH here, so this is its serial console")
        from undercroft.cli.console import attach

        return attach(croft, name)


def _ssh_port(croft: Croft, vm: Any) -> Any:
    """The forward that leads to the guest's SSH, if this machine can reach it."""
    from undercroft.cli.vms import forwards

    if croft.url is not None and not croft.url.startswith("unix:"):
        return None  # forwards lie on the loopback of the machine where the daemon is
    return next((f for f in forwards(vm) if f.get("guest_port") == 22), None)


def _image_user(croft: Croft, vm: Any) -> str | None:
    from undercroft.model.errors import UndercroftError

    image = dig(vm, "spec.image")
    if not image:
        return None
    try:
        found = croft.api.get(f"/v1/images/{quote(image)}")
    except UndercroftError:
        return None
    user = dig(found, "status.content.defaults.user")
    return None if user is None else str(user)


def _wait_for_banner(croft: Croft, name: str, address: tuple[str, int], patience: float) -> bool:
    """Whether SSH answers in time. User-mode networking accepts connections before the guest does,
    so only its greeting (RFC 4253, section 4.2) counts."""
    begun = time.monotonic()
    told = False
    while True:
        try:
            with socket.create_connection(address, 5.0) as probe:
                if probe.recv(4) == b"SSH-":
                    return True
        except OSError:
            pass
        waited = time.monotonic() - begun
        if waited > patience:
            return False
        if not told and waited > 1.0:
            croft.note(f"waiting for {name} to answer to SSH (it may be booting) …")
            told = True
        time.sleep(_STEP)


def _command(
    croft: Croft,
    vm: Any,
    address: tuple[str, int],
    user: str | None,
    options: str,
    argv: list[str],
) -> list[str]:
    import shlex

    from undercroft.cli.keys import known_hosts, own_key

    hosts = known_hosts(croft.environ)
    os.makedirs(os.path.dirname(hosts), mode=0o700, exist_ok=True)
    command = ["ssh", "-p", str(address[1])]
    # The identity of the VM, not an address that another one may get tomorrow.
    command += ["-o", f"HostKeyAlias={dig(vm, 'meta.id')}"]
    command += ["-o", f'UserKnownHostsFile="{hosts}"', "-o", "StrictHostKeyChecking=accept-new"]
    command += ["-o", "CheckHostIP=no", "-o", "LogLevel=ERROR"]
    if os.path.exists(own := own_key(croft.environ)):
        command += ["-i", own]
    command += shlex.split(options)
    if user:
        command += ["-l", user]
    if argv and sys.stdin.isatty() and sys.stdout.isatty():
        command.append("-t")
    command += [address[0]]
    if argv:
        command += ["--", *argv]
    return command
