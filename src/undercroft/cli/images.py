"""Images: what VMs are made from."""

from __future__ import annotations

import os
import sys
import time

from undercroft.cli.command import Command, Namespace, Parser, add_names
from undercroft.cli.errors import OK, UsageError
from undercroft.cli.output import Table, ago, dig, elapsed, size
from undercroft.cli.progress import report_failures, wait
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from undercroft.cli.context import Croft

_FORMATS = ("raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi")
_PIECE = 1 << 20


class Ls(Command):
    """``croft image ls``"""

    description = "Lists the images that are here. What else can be had: croft image catalogue."
    examples = (("croft image ls", "all images"), ("croft image ls -q", "only their names"))

    def run(self, croft: Croft, args: Namespace) -> int:
        images = list(croft.api.list("/v1/images", {"sort": "meta.name"}))
        if croft.json:
            croft.print_json(images)
            return OK
        if croft.quiet:
            for image in images:
                print(dig(image, "meta.name", ""))
            return OK
        if not images:
            croft.note("no images yet: croft image build tiny, croft image catalogue")
            return OK
        now = time.time()
        table = Table(
            croft.out, ("NAME", "STATE", "SYSTEM", "ARCH", ">DISK", ">SIZE", "FROM", "AGE")
        )
        for image in images:
            virtual = dig(image, "status.content.virtual_size")
            table.add(
                dig(image, "meta.name", ""),
                dig(image, "status.state", ""),
                dig(image, "status.content.os", ""),
                dig(image, "status.content.arch", ""),
                size(virtual) if virtual else "",
                size(dig(image, "status.size")) if dig(image, "status.size") else "",
                dig(image, "spec.source", ""),
                ago(now - dig(image, "meta.created", now)),
            )
        print(table.render(), end="")
        return OK


class Show(Command):
    """``croft image show IMAGE``"""

    description = "Shows what is in an image, where it came from, and what VMs get from it."
    examples = (("croft image show debian:12", "for people"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "IMAGE", plural=False)

    def run(self, croft: Croft, args: Namespace) -> int:
        image = croft.api.get(f"/v1/images/{quote(args.name)}")
        if croft.json:
            croft.print_json(image)
            return OK
        from undercroft.cli.detail import image_detail

        print(image_detail(croft, image), end="")
        return OK


def finish(croft: Croft, task: Any, no_wait: bool) -> int:
    """Waits for the task that makes an image, and tells of it."""
    if no_wait:
        if croft.json:
            croft.print_json(task)
        else:
            print(task["meta"]["id"])
        return OK
    begun = dig(task, "meta.created", 0)
    task = wait(croft, [task])[0]
    if code := report_failures(croft, [task]):
        return code
    image = croft.api.get(f"/v1/images/{quote(str(dig(task, 'spec.object.id')))}")
    if croft.json:
        croft.print_json(image)
        return OK
    name = dig(image, "meta.name")
    took = max((dig(task, "status.finished") or 0) - begun, 0)
    about = [dig(image, "status.content.os", ""), size(dig(image, "status.size"))]
    style = croft.out
    croft.say(
        f"{style.paint(name, 'bold')} is {style.state('ready')} "
        f"({', '.join(part for part in about if part)})   {style.paint(elapsed(took), 'dim')}"
    )
    croft.say(f"  {style.paint('next', 'dim')}  {style.paint(f'croft run {name}', 'cyan')}")
    return OK


def _add_common(parser: Parser) -> None:
    parser.add_argument("-n", "--name", help="what to call it")
    parser.add_argument(
        "--replace", action="store_true", help="take the name over from an older image"
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="only ask for it; print the task's id"
    )


class Build(Command):
    """``croft image build WHAT``"""

    description = """
        Builds an image on this host from packages of the distribution: tiny is a kernel and busybox
        that boot in seconds; debian:12 is a full Debian with systemd, cloud-init, guest agent and
        SSH.
    """
    examples = (
        ("croft image build tiny", "seconds"),
        ("croft image build debian:12", "a minute or two"),
        ("croft image build debian:12 --replace", "again, with today's packages"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("what", metavar="WHAT", help="tiny or debian:12")
        _add_common(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        request = {"source": "build", "value": args.what, "replace": args.replace}
        if args.name:
            request["name"] = args.name
        return finish(croft, croft.api.post("/v1/images", request), args.no_wait)


class Import(Command):
    """``croft image import FILE|URL``"""

    description = """
        Makes an image from a disk: a file here, an address that the daemon fetches (a download that
        is cut off goes on where it stopped), or a name of croft image catalogue. The checksum is
        compared before anything looks into the content. The format of raw disks has to be said.
    """
    examples = (
        ("croft image import disk.qcow2 --name mine", "a file"),
        ("croft image import disk.img --format raw --firmware uefi", "a raw disk that wants UEFI"),
        ("croft image import https://example.org/d.qcow2 --sha256 9f86…", "from the network"),
        ("zcat disk.img.gz | croft image import - --format raw --name mine", "from a pipe"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("source", metavar="FILE|URL|NAME", help="- reads from a pipe")
        _add_common(parser)
        parser.add_argument("--sha256", metavar="HEX", help="checksum that it must have")
        parser.add_argument("--format", choices=_FORMATS, help="format of the disk")
        parser.add_argument("--firmware", choices=("bios", "uefi"), help="what it boots with")
        parser.add_argument("--user", help="account that cloud-init makes, or that is in it")

    def run(self, croft: Croft, args: Namespace) -> int:
        names = ("name", "sha256", "format", "firmware", "user")
        given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
        if args.replace:
            given["replace"] = True
        source = args.source
        if source.startswith(("http://", "https://")):
            task = croft.api.post("/v1/images", {"source": "url", "value": source, **given})
        elif source == "-":
            if "name" not in given:
                raise UsageError("what comes from a pipe needs a name", "add --name NAME")
            task = self._upload(croft, sys.stdin.fileno(), None, given)
        elif os.path.exists(source):
            given.setdefault("name", _name_of(source))
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                length = os.fstat(descriptor).st_size
                task = self._upload(croft, descriptor, length, given)
            finally:
                os.close(descriptor)
        else:
            from undercroft.cli.fetch import catalogue_names

            if source not in catalogue_names(croft):
                raise UsageError(
                    f"{source} is neither a file, nor an address, nor in the catalogue",
                    "see: croft image catalogue",
                )
            task = croft.api.post("/v1/images", {"source": "catalogue", "value": source, **given})
        return finish(croft, task, args.no_wait)

    def _upload(
        self, croft: Croft, descriptor: int, length: int | None, params: dict[str, object]
    ) -> Any:
        """Sends the file: the daemon may run as somebody who cannot read it."""
        import json

        from undercroft.cli.transfer import shown

        with shown(croft, f"send {params['name']}", length) as count:
            response = croft.api.request(
                "POST",
                "/v1/images/upload",
                params=params,
                headers={"content-type": "application/octet-stream"},
                body=count(_pieces(descriptor)),
                timeout=600.0,
            )
        return json.loads(response.read())


def _pieces(descriptor: int) -> Iterator[bytes]:
    while data := os.read(descriptor, _PIECE):
        yield data


def _name_of(path: str) -> str:
    """A name for an image from that of its file."""
    import re

    stem = re.sub(r"\.(qcow2|raw|img|vmdk|vhdx?|vdi)$", "", os.path.basename(path).lower())
    return re.sub(r"[^a-z0-9._-]+", "-", stem)[:60].strip("-._") or "imported"


class Catalogue(Command):
    """``croft image catalogue``"""

    description = """
        Lists the images of the big distributions that can be fetched by name, with croft run NAME
        or croft image import NAME.
    """
    examples = (("croft run NAME", "fetch and run one of them"),)

    def run(self, croft: Croft, args: Namespace) -> int:
        answer = croft.api.get("/v1/catalogue")
        items = answer["items"]
        if croft.json:
            croft.print_json(items)
            return OK
        from undercroft.cli.fetch import BUILT

        table = Table(croft.out, ("NAME", "FROM", "WHAT"), state="")
        for name, what in BUILT.items():
            table.add(name, "build", what)
        for item in items:
            if dig(item, "name") not in BUILT:
                what = dig(item, "title") or dig(item, "os") or dig(item, "url") or ""
                table.add(str(dig(item, "name", "")), "fetch", str(what))
        print(table.render(), end="")
        return OK


class Rm(Command):
    """``croft image rm IMAGE…``"""

    description = """
        Removes images that no VM was made from. With --force also one that is still being made.
    """
    examples = (("croft image rm debian:12", "make room"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "IMAGE")
        parser.add_argument("-f", "--force", action="store_true", help="stop its making first")
        parser.add_argument(
            "--no-wait", action="store_true", help="only ask for it; print the task's id"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        return act(
            croft,
            args.names,
            lambda ref: croft.api.delete(
                f"/v1/images/{quote(ref)}", {"force": True} if args.force else None
            ),
            "is removed",
            no_wait=args.no_wait,
        )
