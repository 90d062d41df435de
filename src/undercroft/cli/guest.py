"""Running programs in a guest."""

from __future__ import annotations

import os
import stat
import sys

from undercroft.cli.command import Command, Namespace, Parser, add_names, duration, label
from undercroft.cli.errors import (
    EXEC_FAILED,
    NOT_A_PROGRAM,
    NOT_THERE,
    UsageError,
    ours,
    report,
)
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft
    from undercroft.model.errors import UndercroftError

_LIMIT = 600.0  # seconds
_PATIENCE = 90.0


class Exec(Command):
    """``croft exec VM -- PROGRAM…``"""

    description = """
        Runs a program in the VM through its guest agent, as root, without a terminal, and waits for
        its end; for a guest that is still booting it waits. Its output is yours, and so is its exit
        code; croft's own failures are 125. What comes from a pipe or file becomes its input. There
        is no shell unless you call one.
    """
    examples = (
        ("croft exec web1 -- uname -a", "one program"),
        ("croft exec web1 -- sh -c 'df -h | tail -3'", "a shell command"),
        ("croft exec web1 -e LANG=C -- ls /root", "with a variable set"),
        ("croft exec db1 -- psql -f - < dump.sql", "with input"),
        ("croft exec --timeout 1h web1 -- apt-get -y upgrade", "a long one"),
    )
    program = True

    def arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "-e",
            "--env",
            action="append",
            type=label,
            default=[],
            metavar="KEY=VALUE",
            help="set a variable; several times",
        )
        parser.add_argument(
            "-t",
            "--timeout",
            type=duration,
            default=_LIMIT,
            metavar="TIME",
            help="wait no longer than this (default: 10m)",
        )
        parser.add_argument(
            "--wait",
            type=duration,
            default=_PATIENCE,
            metavar="TIME",
            help="for a guest that still boots (default: 90s)",
        )
        parser.add_argument("-n", "--no-stdin", action="store_true", help="pass no input on")
        add_names(parser, plural=False)

    def run(self, croft: Croft, args: Namespace) -> int:
        argv: list[str] = args.argv
        if not argv:
            raise UsageError(
                "croft exec needs a program to run", f"croft exec {args.name} -- uname -a"
            )
        data = None if args.no_stdin else _input()
        try:
            from undercroft.cli.patience import patiently

            result: dict[str, Any] = patiently(
                croft,
                args.name,
                lambda: execute(croft, args.name, argv, data, dict(args.env), args.timeout),
                args.wait,
            )
        except Exception as error:
            if (known := ours(error)) is None:
                raise
            report(croft, known)
            return _not_run(known)
        if croft.json:
            croft.print_json(result)
        else:
            from base64 import b64decode

            for stream, key in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
                stream.buffer.write(b64decode(result.get(key) or ""))
                stream.flush()
            if result.get("truncated"):
                croft.note("croft: there was more output than the guest agent keeps")
        if (signal := result.get("signal")) is not None:
            return 128 + int(signal)
        code = result.get("exit_code")
        return EXEC_FAILED if code is None else int(code)


def execute(
    croft: Croft,
    name: str,
    argv: list[str],
    data: bytes | None = None,
    env: dict[str, str] | None = None,
    timeout: float = _LIMIT,
) -> Any:
    """Runs a program in a guest; the API's ExecResult."""
    import json
    from base64 import b64encode

    request: dict[str, object] = {"argv": argv, "timeout": timeout}
    if data is not None:
        request["input"] = b64encode(data).decode()
    if env:
        request["env"] = env
    response = croft.api.request(
        "POST",
        f"/v1/vms/{quote(name)}/exec",
        headers={"content-type": "application/json"},
        body=json.dumps(request).encode(),
        timeout=timeout + 30.0,
    )
    return json.loads(response.read())


def _not_run(error: UndercroftError) -> int:
    """The exit code that a shell has for a program that it cannot run."""
    if error.code != "no-program":
        return EXEC_FAILED
    return NOT_THERE if "there is no program" in error.message else NOT_A_PROGRAM


def _input() -> bytes | None:
    """What was piped in; nothing from a terminal or a device such as /dev/null."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return None
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
        return sys.stdin.buffer.read()
    return None
