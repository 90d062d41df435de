"""What a user reads when something goes wrong, and what croft's exit code says.

0    done
1    it failed: the message says what, why and what to do
2    croft was called wrongly
3    there is no such object
4    no daemon answers, or none could be started
125  ``croft exec`` itself failed; 126: the program cannot be run; 127: it is not there; any other
     code is that of the program in the guest
130  interrupted with Ctrl-C (what was under way goes on)
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from undercroft.cli.context import Croft
    from undercroft.model.errors import UndercroftError

OK = 0
FAILED = 1
USAGE = 2
NOT_FOUND = 3
NO_DAEMON = 4
EXEC_FAILED = 125
NOT_A_PROGRAM = 126
NOT_THERE = 127
INTERRUPTED = 130

_CODES = {"not-found": NOT_FOUND, "daemon": NO_DAEMON}
_LISTS = {
    "vm": ("/v1/vms", "croft ls"),
    "image": ("/v1/images", "croft image ls"),
    "volume": ("/v1/volumes", "croft volume ls"),
}


class UsageError(Exception):
    """croft was called in a way that makes no sense. ``hint`` says what would."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Interrupted(Exception):
    """The user stopped waiting for something that goes on."""


class Ended(BaseException):
    """A signal asks croft to end; raised so that what was changed outside is put back first."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


def ours(error: BaseException) -> UndercroftError | None:
    """The error if it is of Undercroft's tree. Where that was never loaded it cannot be."""
    module = sys.modules.get("undercroft.model.errors")
    return error if module is not None and isinstance(error, module.UndercroftError) else None


def exit_code(error: UndercroftError) -> int:
    """The exit code that belongs to an error."""
    return _CODES.get(error.code, FAILED)


def report(croft: Croft, error: UndercroftError) -> int:
    """Tells of an error on stderr (as problem JSON with ``--json``) and returns the exit code."""
    if croft.json:
        import msgspec

        print(msgspec.json.encode(error.problem()).decode(), file=sys.stderr)
        return exit_code(error)
    action = _similar(croft, error) or error.action
    tell(croft, f"{_whole(error)} ({error.code})", action)
    if croft.verbose and error.data:
        for key, value in sorted(error.data.items()):
            croft.note(f"    {key}: {value}")
    return exit_code(error)


def report_usage(croft: Croft, error: UsageError) -> int:
    """Tells of a wrong call."""
    report_plain(croft, "usage", "Wrong usage", error.message, error.hint)
    return USAGE


def report_plain(
    croft: Croft, code: str, title: str, message: str, action: str | None = None
) -> None:
    """Tells of an error that is croft's own, not the daemon's."""
    if not croft.json:
        tell(croft, message, action)
        return
    import json

    problem: dict[str, object] = {
        "type": f"urn:undercroft:error:{code}",
        "title": title,
        "status": 400,
        "code": code,
        "detail": message,
    }
    if action:
        problem["action"] = action
    print(json.dumps(problem), file=sys.stderr)


def tell(croft: Croft, message: str, action: str | None = None) -> None:
    """An error as people read it: what was wrong, and below it what to do."""
    style = croft.err
    print(f"{style.paint('croft:', 'red', 'bold')} {style.clean(message)}", file=sys.stderr)
    if action:
        first, *rest = style.clean(action, keep="\n").split("\n")
        print(f"  {style.arrow} {first}", file=sys.stderr)
        for line in rest:
            print(f"    {line}", file=sys.stderr)


def closest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known words that look like the given one, best first: versions of it (``it:v1``), …"""
    from difflib import get_close_matches

    known = list(known)
    versions = sorted(name for name in known if name.startswith(f"{word}:"))
    alike = get_close_matches(word, known, n=count, cutoff=0.6)
    return list(dict.fromkeys([*versions, *alike]))[:count]


def _whole(error: UndercroftError) -> str:
    """The message, with the object in front where the message does not name it."""
    if error.object and error.object.rpartition(" ")[2] not in error.message:
        return f"{error.object}: {error.message}"
    return error.message


def _similar(croft: Croft, error: UndercroftError) -> str | None:
    """What the user may have meant, for an object that does not exist."""
    if error.code != "not-found" or not croft.connected:
        return None
    kind, _, name = (error.object or "").partition(" ")
    if kind not in _LISTS or not name:
        return None
    path, listing = _LISTS[kind]
    from undercroft.model.errors import UndercroftError as AnyError

    try:
        names = [item["meta"]["name"] for item in croft.api.list(path, {"fields": "meta.name"})]
        if kind == "image":
            from undercroft.cli.fetch import BUILT, catalogue_names

            names += [*BUILT, *catalogue_names(croft)]
            listing = f"{listing}, croft image catalogue"
    except (AnyError, KeyError, TypeError):
        return None
    if found := closest(name, dict.fromkeys(names), 3):
        return f"did you mean {' or '.join(found)}? All of them: {listing}"
    if not names:
        return (
            "there are no VMs yet: croft run tiny" if kind == "vm" else f"there are no {kind}s yet"
        )
    return f"see what exists with: {listing}"
