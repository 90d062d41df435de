"""The way in: finds the command, imports it, runs it, and turns whatever goes wrong into words."""

from __future__ import annotations

import gc
import os
import sys

from undercroft.cli import errors
from undercroft.cli.context import Croft
from undercroft.cli.registry import ALIASES, COMMANDS, NOUNS, load, resolve


def main(argv: list[str] | None = None) -> int:
    """Runs croft; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    gc.set_threshold(100_000)  # a listing is many objects, and no garbage
    try:
        if argv in (["--version"], ["-V"]):  # nothing else is needed for it
            from undercroft import __version__

            print(f"croft {__version__}")
            return errors.OK
        if argv[:1] == ["__complete"]:
            from undercroft.cli.complete import complete

            return complete(argv[1:])
        code = _run(argv)
        sys.stdout.flush()  # a reader who has gone shows here, and not when Python ends
        return code
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141  # 128 + SIGPIPE
    except errors.Ended as end:
        return end.code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return errors.INTERRUPTED


def _run(argv: list[str]) -> int:
    from undercroft.cli.command import parse, split_globals

    croft = Croft(json="--json" in argv)
    try:
        given, rest = split_globals(argv)
        croft = _context(given)
        found = resolve(rest)
        if found is None:
            return _no_command(croft, rest)
        words, rest = found
        command = load(words)()
        before = rest[: rest.index("--")] if "--" in rest else rest
        if {"-h", "--help"}.intersection(before[:1] if command.program else before):
            from undercroft.cli.help import explain

            explain(croft, words)
            return errors.OK
        args = parse(words, command, rest, given)
        croft = _context(vars(args))
        return command.run(croft, args)
    except errors.UsageError as error:
        return errors.report_usage(croft, error)
    except errors.Interrupted:
        return errors.INTERRUPTED
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except Exception as error:
        return _failed(croft, error)


def _context(given: dict[str, object]) -> Croft:
    data, url = given.get("data"), given.get("url")
    return Croft(
        data=None if data is None else str(data),
        url=None if url is None else str(url),
        json=bool(given.get("json")),
        quiet=bool(given.get("quiet")),
        color=not given.get("no_color"),
        verbose=bool(given.get("verbose")),
    )


def _no_command(croft: Croft, words: list[str]) -> int:
    from undercroft.cli.help import explain_noun, tour
    from undercroft.cli.hints import elsewhere

    if not words:
        tour(croft)
        return errors.OK
    word = words[0]
    if word in NOUNS:
        if len(words) == 1 or words[1] in ("-h", "--help"):
            explain_noun(croft, word)
            return errors.OK
        verbs = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{word} ")]
        hint = f"there are: {', '.join(verbs)}"
        if known := elsewhere(words):
            hint = known
        elif found := errors.closest(words[1], verbs):
            hint = f"did you mean: croft {word} {found[0]}"
        raise errors.UsageError(f"croft {word} has no command {words[1]!r}", hint)
    if known := elsewhere(words):
        hint = known
    elif found := errors.closest(word, {*COMMANDS, *ALIASES, *NOUNS}, 2):
        hint = "did you mean: " + " or ".join(f"croft {ALIASES.get(w, w)}" for w in found)
    else:
        hint = "see all commands with: croft help"
    raise errors.UsageError(f"croft has no command {word!r}", hint)


def _failed(croft: Croft, error: Exception) -> int:
    if os.environ.get("CROFT_DEBUG"):
        import traceback

        traceback.print_exc()
    if known := errors.ours(error):
        return errors.report(croft, known)
    if isinstance(error, OSError):
        # Files of the user's own: a key, a disk to import, where a copy goes.
        where = f"{error.filename}: " if error.filename else ""
        reason = (error.strerror or str(error)).lower()
        errors.report_plain(croft, "file", "Local file", f"{where}{reason}")
        return errors.FAILED
    errors.report_plain(
        croft,
        "internal",
        "Internal error",
        f"something went wrong inside croft: {type(error).__name__}: {error} (internal)",
        "this is a fault of croft's own; CROFT_DEBUG=1 shows where",
    )
    return errors.FAILED
