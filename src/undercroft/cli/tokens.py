"""Tokens: who may use the API over the network. They are kept in the data directory, so this works
without a daemon, for whoever owns the directory."""

from __future__ import annotations

import os
from pathlib import Path

from undercroft.cli.command import Command, Namespace, Parser
from undercroft.cli.errors import OK, UsageError
from undercroft.cli.output import Table, local_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.api.tokens import TokenFile
    from undercroft.cli.context import Croft


def _file(croft: Croft) -> TokenFile:
    from undercroft.api.tokens import TokenFile

    if croft.url is not None:
        raise UsageError("tokens are made where the daemon is", "leave out --url, unset CROFT_URL")
    return TokenFile(Path(croft.data) / "tokens.json")


class Create(Command):
    """``croft token create NAME``"""

    description = """
        Makes a token with which somebody can use this daemon over the network, once it listens
        there (croft daemon --listen). Its text is printed now and never again. Without --privilege
        it may do everything.
    """
    examples = (
        ("croft token create laptop", "for yourself"),
        ("croft token create monitor --privilege vm.view --privilege host.view", "only to look"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="NAME", help="whom it is for")
        parser.add_argument(
            "-p",
            "--privilege",
            action="append",
            metavar="PRIVILEGE",
            help="what it allows (vm.view, vm.power, …; default: everything); several times",
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        tokens = _file(croft)
        if not os.path.isdir(croft.data):
            croft.api  # noqa: B018 - a daemon that is started makes the directory
        text = tokens.create(args.name, args.privilege or ["*"])
        fingerprint = _fingerprint(croft)
        if croft.json:
            croft.print_json({"name": args.name, "token": text, "fingerprint": fingerprint})
            return OK
        if croft.quiet:
            print(text)
            return OK
        print(text)
        croft.note("It is shown only now. Where it shall be used:")
        croft.note("  export CROFT_URL=https://THIS-HOST:PORT   (croft daemon --listen ADDR:PORT)")
        croft.note("  export CROFT_TOKEN=…")
        croft.note(f"  export CROFT_FINGERPRINT={fingerprint}")
        return OK


def _fingerprint(croft: Croft) -> str:
    """That of the daemon's certificate, which is made if there is none yet."""
    from undercroft.api.certificate import ensure_certificate

    return ensure_certificate(Path(croft.data) / "tls").fingerprint


class Ls(Command):
    """``croft token ls``"""

    description = "Lists the tokens, and what they allow."
    examples = (("croft token ls", "all of them"),)

    def run(self, croft: Croft, args: Namespace) -> int:
        tokens = _file(croft).list()
        if croft.json:
            croft.print_json(
                [
                    {"name": t.name, "privileges": list(t.privileges), "created": t.created}
                    for t in tokens
                ]
            )
            return OK
        if croft.quiet:
            for token in tokens:
                print(token.name)
            return OK
        if not tokens:
            croft.note("no tokens: croft token create NAME makes one")
            return OK
        table = Table(croft.out, ("NAME", "ALLOWS", "CREATED"), state="")
        for token in tokens:
            allows = "everything" if "*" in token.privileges else ", ".join(token.privileges)
            table.add(token.name, allows, local_time(token.created))
        print(table.render(), end="")
        return OK


class Rm(Command):
    """``croft token rm NAME…``"""

    description = "Makes tokens invalid, at once."
    examples = (("croft token rm laptop", "it is lost"),)

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("names", metavar="NAME", nargs="+", help="of croft token ls")

    def run(self, croft: Croft, args: Namespace) -> int:
        tokens = _file(croft)
        for name in dict.fromkeys(args.names):
            tokens.remove(name)
            croft.say(f"token {name} is no longer valid")
        return OK
