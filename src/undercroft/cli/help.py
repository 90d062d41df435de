"""Help that teaches: a tour of croft, and an explanation of each command with examples."""

from __future__ import annotations

import argparse
import textwrap

from undercroft.cli.command import EVERYWHERE, Command, Namespace, Parser, build
from undercroft.cli.errors import OK, UsageError
from undercroft.cli.output import Style
from undercroft.cli.registry import ALIASES, COMMANDS, NOUNS, THEMES, load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.cli.context import Croft

_WIDEST = 100
_TITLES = {"positional arguments": "Arguments", "options": "Options"}
_EVERYWHERE = (
    "Everywhere: --json, -q/--quiet, -v/--verbose, --no-color, "
    "--data DIR (CROFT_DATA), --url URL (CROFT_URL)."
)
_FIRST_STEPS = (
    ("croft run tiny --name first", "a small Linux in a few seconds"),
    ("croft console first", "look at it; Ctrl-] leaves"),
    ("croft run debian:12 --name web1 --memory 1G --publish 8080:80", "a full Debian"),
    ("croft shell web1", "log in"),
    ("croft rm --force first web1", "throw both away"),
)


class Help(Command):
    """``croft help [COMMAND]``."""

    description = "Without a name it shows the tour; with one it explains that command."
    examples = (("croft help run", "explain croft run"), ("croft help image", "all about images"))

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("command", nargs="*", metavar="COMMAND", help="what to explain")

    def run(self, croft: Croft, args: Namespace) -> int:
        words = " ".join(args.command)
        words = ALIASES.get(words, words)
        if not words:
            tour(croft)
        elif words in COMMANDS:
            explain(croft, words)
        elif words in NOUNS:
            explain_noun(croft, words)
        else:
            from undercroft.cli.hints import elsewhere

            hint = elsewhere(args.command) or "see all commands with: croft help"
            raise UsageError(f"croft has no command {words!r}", hint)
        return OK


def tour(croft: Croft) -> None:
    """What croft can do, by theme."""
    style = croft.out
    width = max(len(words) for _, commands in THEMES for words in commands) + 2
    lines = [
        f"{style.paint('croft', 'bold')} runs many isolated operating systems on this machine.",
        "",
        style.paint("First steps", "bold"),
        *_table(style, list(_FIRST_STEPS)),
    ]
    for theme, commands in THEMES:
        lines += ["", style.paint(theme, "bold")]
        for words in commands:
            pad = " " * (width - len(words))
            lines.append(f"  {style.paint(words, 'cyan')}{pad}{COMMANDS[words][2]}")
    lines += [
        "",
        f"{style.paint('croft help COMMAND', 'cyan')} explains one of them, with examples.",
        style.paint(_EVERYWHERE, "dim"),
    ]
    print("\n".join(lines))


def explain_noun(croft: Croft, noun: str) -> None:
    """The commands of a noun."""
    style = croft.out
    rows = [(f"croft {w}", c[2]) for w, c in COMMANDS.items() if w.startswith(f"{noun} ")]
    print("\n".join([style.paint(NOUNS[noun], "bold"), *_table(style, rows), ""]))
    print(f"croft help {noun} COMMAND explains one of them.")


def explain(croft: Croft, words: str) -> None:
    """One command: what it does, what it takes, examples."""
    style = croft.out
    width = min(style.width or _WIDEST, _WIDEST)
    command = load(words)()
    parser = build(words, command)
    lines = [COMMANDS[words][2] + ".", ""]
    lines += [style.paint("Usage", "bold"), f"  {_usage(parser)}"]
    if command.description:
        text = textwrap.dedent(command.description).strip()
        for paragraph in text.split("\n\n"):
            lines += ["", *textwrap.wrap(" ".join(paragraph.split()), width)]
    for group in parser._action_groups:  # argparse offers no other way to leave its usage out
        if group.title == EVERYWHERE or not group._group_actions:
            continue
        formatter = _Formatter(parser.prog, max_help_position=30, width=width)
        title = _TITLES.get(str(group.title), str(group.title).capitalize())
        formatter.start_section(title)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
        text = formatter.format_help().removeprefix(f"{title}:\n").rstrip("\n")
        lines += ["", style.paint(title, "bold"), text]
    if command.examples:
        lines += ["", style.paint("Examples", "bold"), *_table(style, list(command.examples))]
    lines += ["", style.paint(_EVERYWHERE, "dim")]
    print("\n".join(lines))


def _usage(parser: Parser) -> str:
    """``croft stop [OPTIONS] VM…``"""
    parts = [parser.prog, "[OPTIONS]"]
    for action in parser._actions:
        if not action.option_strings:
            name = str(action.metavar or action.dest.upper())
            name += "…" if action.nargs == "+" and not name.endswith(" TARGET") else ""
            parts.append(f"[{name}]" if action.nargs in ("?", "*") else name)
    return " ".join(parts).replace("PROGRAM…", "-- PROGRAM…")


class _Formatter(argparse.HelpFormatter):
    """argparse's, with one metavar for all spellings of an option: ``-n, --lines N``."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        metavar = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {metavar}"


def _table(style: Style, rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows) + 2
    return [f"  {style.paint(a, 'cyan')}{' ' * (width - len(a))}{b}" for a, b in rows]
