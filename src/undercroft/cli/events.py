"""Events: what happened."""

from __future__ import annotations

import json
import time

from undercroft.cli.command import Command, Namespace, Parser
from undercroft.cli.errors import OK
from undercroft.cli.output import dig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft


class Events(Command):
    """``croft events``"""

    description = """
        Shows what happened, oldest first; with --follow also what happens from now on, until
        Ctrl-C, even across a restart of the daemon. Every event has a revision, from which --after
        goes on.
    """
    examples = (
        ("croft events", "the last 50"),
        ("croft events --follow", "and whatever comes"),
        ("croft events web1 -n 10", "only about one VM"),
        ("croft events --follow --json | jq .type", "for programs: one line each"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("object", nargs="?", metavar="OBJECT", help="only about this VM, image")
        parser.add_argument("-f", "--follow", action="store_true", help="go on as things happen")
        parser.add_argument(
            "-n", type=int, default=50, metavar="N", help="how many of the past (default: 50)"
        )
        parser.add_argument(
            "--after", type=int, metavar="REVISION", help="only what came after this revision"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        params = {"after": args.after or None, "limit": max(args.n, 1), "object": args.object}
        page = croft.api.get("/v1/events", params)
        items = page["items"] if args.n > 0 else []
        if croft.json and not args.follow:
            croft.print_json(items)
            return OK
        for event in items:
            self._print(croft, event)
        if not items and not args.follow:
            croft.note("nothing happened yet")
        if args.follow:
            from undercroft.client.raw import problem_error
            from undercroft.client.streams import follow

            after: dict[str, object] = {"after": page["revision"]}
            for message in follow(croft.api, "/v1/events/stream", after, "after"):
                if message.event == "error":
                    raise problem_error(str(croft.endpoint), 500, message.data.encode())
                if message.event != "message":
                    continue  # only where the stream is
                event = json.loads(message.data)
                about = (dig(event, "object.name"), dig(event, "object.id"))
                if args.object is None or args.object in about:
                    self._print(croft, event)
        return OK

    def _print(self, croft: Croft, event: Any) -> None:
        if croft.json:
            print(json.dumps(event, ensure_ascii=False), flush=True)
            return
        style = croft.out
        when = time.localtime(dig(event, "meta.created", 0))
        today = time.localtime()[:3] == when[:3]
        stamp = time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", when)
        level = dig(event, "level", "info")
        message = style.clean(str(dig(event, "message", "")))
        if level != "info":
            message = style.paint(message, "red" if level == "error" else "yellow")
        by = dig(event, "by", "system")
        who = "" if by == "system" else style.paint(f"  ({style.clean(by)})", "dim")
        kind = f"{dig(event, 'type', ''):<18}"
        print(
            f"{style.paint(stamp, 'dim')}  {style.paint(kind, 'cyan')}  {message}{who}", flush=True
        )
