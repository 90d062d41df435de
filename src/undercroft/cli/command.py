"""What a command is, and how its words are read."""

from __future__ import annotations

import argparse

from undercroft.cli.errors import UsageError, closest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from undercroft.cli.context import Croft

Namespace = argparse.Namespace
EVERYWHERE = "everywhere"

GLOBAL_FLAGS = {
    "--json": "json",
    "-q": "quiet",
    "--quiet": "quiet",
    "--no-color": "no_color",
    "--no-colour": "no_color",
    "-v": "verbose",
    "--verbose": "verbose",
}
GLOBAL_VALUES = {"--data": "data", "--url": "url"}


class Command:
    """One command of croft. A subclass says what it takes and does it.

    ``description`` is a paragraph for ``--help``; ``examples`` are pairs of a command line and what
    it is good for. ``program``: what follows ``--``, or the first name, is passed on as
    ``args.argv``; elsewhere options may stand between the names.
    """

    description = ""
    examples: tuple[tuple[str, str], ...] = ()
    program = False

    def arguments(self, parser: Parser) -> None:
        """Declares what the command takes."""

    def run(self, croft: Croft, args: Namespace) -> int:
        """Does it; returns the exit code."""
        raise NotImplementedError


class Parser(argparse.ArgumentParser):
    """Reads the words after a command's name."""

    def __init__(self, words: str) -> None:
        prog = f"croft {words}"
        # A usage of its own: argparse would make one at every call, with imports of 8 ms.
        super().__init__(prog=prog, usage=prog, add_help=False, allow_abbrev=False)
        self.words = words

    def error(self, message: str) -> NoReturn:
        """Explains what is wrong.

        Raises:
            UsageError: always.
        """
        raise UsageError(*self._explain(message))

    def _explain(self, message: str) -> tuple[str, str]:
        see = f"see: croft {self.words} --help"
        if message.startswith("the following arguments are required: "):
            missing = message.partition(": ")[2]
            return f"{self.prog} needs {missing}", see
        if message.startswith("unrecognized arguments: "):
            from undercroft.cli.hints import OPTIONS

            words = message.partition(": ")[2].split()
            word = words[0].partition("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            if not word.startswith("-"):
                if word.isdigit() and "--drive" in known:
                    see = f"is it a drive? --drive {word}"
                return f"{self.prog} does not take {word!r}", see
            if hint := OPTIONS.get(self.words, {}).get(word):
                return f"{self.prog} has no option {word}", hint
            if found := closest(word, known, 2):
                see = f"did you mean {' or '.join(found)}? {see[0].upper()}{see[1:]}"
            return f"{self.prog} has no option {word}", see
        option, _, value = message.partition(": invalid int value: ")
        if value:
            return f"{option.removeprefix('argument ')} is a whole number, not {value}", see
        return f"{self.prog}: {message}", see


def add_globals(parser: argparse.ArgumentParser) -> None:
    """The options that every command takes, before or after its name."""
    group = parser.add_argument_group(EVERYWHERE)
    hidden = argparse.SUPPRESS  # a default would undo what was given before the command's name
    group.add_argument("--json", action="store_true", default=hidden, help="print JSON")
    group.add_argument(
        "-q", "--quiet", action="store_true", default=hidden, help="print only what was asked for"
    )
    group.add_argument(
        "-v", "--verbose", action="store_true", default=hidden, help="print more, also with errors"
    )
    group.add_argument(
        "--no-color", "--no-colour", action="store_true", default=hidden, help="no colours"
    )
    group.add_argument(
        "--data", metavar="DIR", default=hidden, help="the data directory (CROFT_DATA)"
    )
    group.add_argument(
        "--url", metavar="URL", default=hidden, help="a daemon elsewhere (CROFT_URL)"
    )
    group.add_argument("-h", "--help", action="store_true", default=hidden, help="explain")


def build(words: str, command: Command, program: bool = True) -> Parser:
    """The parser of a command; without ``program`` it does not expect one."""
    parser = Parser(words)
    command.arguments(parser)
    if command.program and program:
        parser.add_argument("argv", nargs="...", metavar="PROGRAM…", help="after --")
    add_globals(parser)
    return parser


def parse(words: str, command: Command, rest: list[str], given: dict[str, object]) -> Namespace:
    """Reads what follows a command's name; ``given`` is what was said before it.

    Raises:
        UsageError: it makes no sense.
    """
    if not command.program:
        return build(words, command).parse_intermixed_args(rest, Namespace(**given))
    if "--" in rest:
        cut = rest.index("--")
        parser = build(words, command, program=False)
        args, more = parser.parse_known_intermixed_args(rest[:cut], Namespace(**given))
        if not more:
            args.argv = rest[cut + 1 :]
            return args
    return build(words, command).parse_args(rest, Namespace(**given))


def split_globals(argv: list[str]) -> tuple[dict[str, object], list[str]]:
    """The options before the command's name, and the rest.

    Raises:
        UsageError: an option that croft does not have.
    """
    found: dict[str, object] = {}
    rest = list(argv)
    while rest and rest[0].startswith("-") and rest[0] != "--":
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            return found, ["help", *rest]
        if word in ("-V", "--version"):
            return found, ["version", "--short", *rest]
        if word in GLOBAL_FLAGS:
            found[GLOBAL_FLAGS[word]] = True
        elif name in GLOBAL_VALUES:
            if not equals:
                if not rest:
                    raise UsageError(f"{name} needs a value", "see: croft help")
                value = rest.pop(0)
            found[GLOBAL_VALUES[name]] = value
        else:
            raise UsageError(
                f"croft has no option {name} before the command's name",
                "write it after the name, or see: croft help",
            )
    return found, rest


def label(text: str) -> tuple[str, str]:
    """``key=value``.

    Raises:
        ArgumentTypeError: it is not.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def size(text: str) -> int:
    """A size in bytes from ``1G``.

    Raises:
        ArgumentTypeError: it is not one.
    """
    from undercroft.model.errors import InvalidError
    from undercroft.model.units import parse_size

    try:
        return parse_size(text)
    except InvalidError as error:
        raise argparse.ArgumentTypeError(f"{error.message}: {error.action}") from None


def duration(text: str) -> float:
    """Seconds from ``90``, ``90s`` or ``5m``.

    Raises:
        ArgumentTypeError: it is not one.
    """
    from undercroft.model.errors import InvalidError
    from undercroft.model.units import parse_duration

    try:
        return parse_duration(text)
    except InvalidError as error:
        raise argparse.ArgumentTypeError(f"{error.message}: {error.action}") from None


def add_names(parser: Parser, what: str = "VM", plural: bool = True) -> None:
    """The names (or ids) of what the command is about."""
    noun = "a VM's name or id" if what == "VM" else f"name or id of the {what.lower()}"
    if plural:
        parser.add_argument("names", metavar=what, nargs="+", help=noun)
    else:
        parser.add_argument("name", metavar=what, help=noun)


def add_encryption(parser: Parser) -> None:
    """Whether a copy is encrypted: as its source is, unless it is said."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--encrypt", dest="encrypted", action="store_const", const=True, help="encrypt it"
    )
    group.add_argument(
        "--decrypt",
        dest="encrypted",
        action="store_const",
        const=False,
        help="a full copy of what is encrypted, in the clear",
    )


def encryption(args: Namespace) -> dict[str, bool]:
    """What of that goes into a request."""
    return {} if args.encrypted is None else {"encrypted": args.encrypted}
