"""Versions."""

from __future__ import annotations

from undercroft.cli.command import Command, Namespace, Parser
from undercroft.cli.errors import OK, ours

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.cli.context import Croft


class Version(Command):
    """``croft version``"""

    description = "Prints the version of croft, and that of the daemon if one answers."
    examples = (("croft version", "both"), ("croft --version", "croft's own, at once"))

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("--short", action="store_true", help="croft's own only")

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft import __version__

        info = None
        if not args.short:
            try:
                info = croft.connect(start=False).get("/v1")
            except Exception as error:
                if ours(error) is None:
                    raise
        if croft.json:
            croft.print_json({"croft": __version__, "daemon": info})
            return OK
        print(f"croft {__version__}")
        if info is not None:
            print(f"daemon {info.get('version')} (API {info.get('api')}, {croft.endpoint})")
        elif not args.short:
            print("no daemon answers")
        return OK
