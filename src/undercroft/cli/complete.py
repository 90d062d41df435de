"""What fits at the cursor: ``croft __complete WORD… CURRENT`` prints a candidate a line.

Called by the shells at every TAB, so it must be quick, silent, and never start a daemon. A line
``:files`` asks the shell for file names; a candidate may be followed by a tab and an explanation.
"""

from __future__ import annotations

import argparse

from undercroft.cli.command import GLOBAL_FLAGS, GLOBAL_VALUES, Parser, build
from undercroft.cli.context import Croft
from undercroft.cli.output import dig
from undercroft.cli.registry import COMMANDS, NOUNS, load, resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

Found = tuple[str, str]

_FILES = (":files", "")
_TIMEOUT = 1.0
# Which VMs a command is for.
_STATES = {
    "start": ("stopped", "failed"),
    "stop": ("running", "starting", "paused", "suspended"),
    "restart": ("running",),
    "reset": ("running", "paused"),
    "pause": ("running",),
    "resume": ("paused", "suspended"),
    "suspend": ("running", "paused"),
    "console": ("running", "starting", "paused"),
    "shell": ("running",),
    "exec": ("running",),
    "screenshot": ("running", "paused"),
}


def complete(words: list[str]) -> int:
    """Prints what may stand in the place of the last word."""
    try:
        for text, about in sorted(set(candidates(words))):
            print(f"{text}\t{about}" if about else text)
    except Exception:  # noqa: S110 - an error message in the middle of typing helps nobody
        pass
    return 0


def candidates(words: list[str]) -> Iterator[Found]:
    """What begins like the last of the words and fits behind the others."""
    *before, current = words or [""]
    croft, before = _globals(before)
    if croft is None:
        yield _FILES
        return
    if before[:1] == ["help"]:
        before = before[1:]
        found = None
    else:
        found = resolve(before)
    if found is None:
        yield from _first(before, current)
        return
    name, given = found
    parser = build(name, load(name)())
    for text, about in _inside(croft, name, parser, given, current):
        if text.startswith((current, ":")):
            yield text, about


def _globals(words: list[str]) -> tuple[Croft | None, list[str]]:
    """The context from options before the command; None where a value is being typed."""
    data = url = None
    rest = list(words)
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option in GLOBAL_VALUES:
            if not rest:
                return None, []
            value = rest.pop(0)
            data, url = (value, url) if option == "--data" else (data, value)
    return Croft(data=data, url=url), rest


def _first(before: list[str], current: str) -> Iterator[Found]:
    """Commands, and the options that may stand before them."""
    prefix = f"{before[0]} " if before and before[0] in NOUNS else ""
    if before and not prefix:
        return
    for words, (_, _, summary) in COMMANDS.items():
        if not words.startswith(prefix):
            continue
        word, space, _ = words.removeprefix(prefix).partition(" ")
        if word.startswith(current):
            yield word, NOUNS[word] if space else summary
    if not prefix and current.startswith("-"):
        for option in (*GLOBAL_FLAGS, *GLOBAL_VALUES):
            if option.startswith(current):
                yield option, ""


def _inside(
    croft: Croft, name: str, parser: Parser, given: list[str], current: str
) -> Iterator[Found]:
    """Options, their values, and what a command is about."""
    options = {text: action for action in parser._actions for text in action.option_strings}
    if "--" in given:
        return
    last = options.get(given[-1]) if given else None
    if last is not None and last.nargs != 0:
        yield from _values(croft, name, last, given)
        return
    if current.startswith("-"):
        for text, action in options.items():
            if len(text) > 2 or current == text:
                yield text, action.help or ""
        return
    positionals = [action for action in parser._actions if not action.option_strings]
    count = len(_plain(given, options))
    for action in positionals:
        several = action.nargs in ("+", "*", "...")
        if count == 0 or several:
            if action.nargs != "...":
                yield from _values(croft, name, action, given)
            return
        count -= 1


def _plain(given: list[str], options: dict[str, argparse.Action]) -> list[str]:
    """The words that are neither options nor values of them."""
    found, skip = [], False
    for word in given:
        if skip:
            skip = False
        elif word.startswith("-") and len(word) > 1:
            action = options.get(word)
            skip = action is not None and action.nargs != 0
        else:
            found.append(word)
    return found


def _values(croft: Croft, name: str, action: argparse.Action, given: list[str]) -> Iterator[Found]:
    """What an option or a name may be."""
    if action.choices is not None:
        for choice in action.choices:
            yield str(choice), ""
        return
    metavar = str(action.metavar or action.dest.upper())
    if name == "export" and metavar == "VM":
        yield from _vms(croft, name, given)
        yield from _names(croft, "/v1/templates", given)
    elif metavar in ("VM", "OBJECT", "PATTERN"):
        yield from _vms(croft, name, given)
    elif metavar == "IMAGE":
        yield from _names(croft, "/v1/images", given)
        if name == "run":
            from undercroft.cli.fetch import BUILT, catalogue_names

            yield from BUILT.items()
            for known in catalogue_names(_quick(croft)):
                yield known, "can be fetched"
    elif metavar == "TASK":
        for task in _list(croft, "/v1/tasks", "meta.id,spec.verb,spec.object.name,status.state"):
            about = f"{dig(task, 'spec.verb')} {dig(task, 'spec.object.name')}"
            if name == "task show" or dig(task, "status.state") in ("pending", "running"):
                yield str(dig(task, "meta.id")), about
    elif metavar == "TEMPLATE":
        yield from _names(croft, "/v1/templates", given)
    elif name == "clone":
        yield from _vms(croft, name, given)
        yield from _names(croft, "/v1/templates", given)
    elif metavar == "DATASTORE":
        yield from _names(croft, "/v1/datastores", given)
    elif metavar.startswith("VOLUME"):
        yield from _names(croft, "/v1/volumes", given)
    elif metavar == "WHAT":
        from undercroft.cli.fetch import BUILT

        yield from BUILT.items()
    elif "FILE" in metavar or "DIR" in metavar or metavar.startswith("ISO"):
        yield _FILES
    elif "SOURCE" in metavar:
        yield _FILES
        for text, about in _vms(croft, "exec", []):
            yield f"{text}:/", about


def _vms(croft: Croft, name: str, given: list[str]) -> Iterator[Found]:
    states = _STATES.get(name)
    for vm in _list(croft, "/v1/vms", "meta.name,status.state"):
        state = str(dig(vm, "status.state"))
        if (states is None or state in states) and dig(vm, "meta.name") not in given:
            yield str(dig(vm, "meta.name")), state


def _names(croft: Croft, path: str, given: list[str]) -> Iterator[Found]:
    for item in _list(croft, path, "meta.name,status.state"):
        if dig(item, "meta.name") not in given:
            yield str(dig(item, "meta.name")), str(dig(item, "status.state", ""))


def _list(croft: Croft, path: str, fields: str) -> Iterator[object]:
    yield from _quick(croft).api.list(path, {"fields": fields})


def _quick(croft: Croft) -> Croft:
    """The context, connected to a daemon that runs already."""
    if not croft.connected:
        croft.use(croft.connect(start=False, timeout=_TIMEOUT))
    return croft
