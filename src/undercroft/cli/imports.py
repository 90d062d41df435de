"""Making VMs of files."""

from __future__ import annotations

import os
import sys
import time

from undercroft.cli.bundle import bundle, is_descriptor
from undercroft.cli.command import Command, Namespace, Parser, label, size
from undercroft.cli.errors import OK, UsageError, ours
from undercroft.cli.output import cpus, dig, elapsed
from undercroft.cli.output import size as text
from undercroft.cli.progress import report_failures, wait
from undercroft.cli.sending import Files, Pipe, is_ours, send
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from undercroft.cli.context import Croft
    from undercroft.cli.sending import Source

_FORMATS = {f: f for f in ("raw", "qcow2", "vmdk", "vhdx", "vdi")} | {"vhd": "vpc"}
_BUSES = ("virtio", "scsi", "sata", "nvme")
_NICS = ("virtio", "e1000e")
_MODES = ("user", "restricted", "none")


class Import(Command):
    """``croft import FILE [NAME]``"""

    description = """
        Makes a VM of a file: an OVA of VMware, VirtualBox or another croft, an OVF with its disks
        beside it, or one disk (qcow2, VMDK, VHD, VHDX, VDI, raw). Its checksums are compared, its
        hardware becomes the nearest there is here, and what cannot be taken over is said. A
        transfer that was cut off goes on where it stopped when the same command is given again.
    """
    examples = (
        ("croft import vmware.ova", "a whole VM, under its own name"),
        ("croft import appliance.ova --look", "only tell what is in it"),
        ("croft import web1.ova web2 --memory 4G --start", "under another name, larger, running"),
        ("croft import disk.vmdk old1 --memory 2G --bus sata", "a disk, with a machine around it"),
        ("croft import disk.img raw1 --format raw --firmware uefi", "raw has to be said"),
        ("croft import net.ova --network Internal=restricted --network none", "by network"),
        ("ssh other croft export web1 - | croft import - web1", "from another host"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("file", metavar="FILE", help="- reads from a pipe")
        parser.add_argument("vm", metavar="NAME", nargs="?", help="(default: as it is called)")
        parser.add_argument("-n", "--name", metavar="NAME", help="the same, as an option")
        parser.add_argument("--look", action="store_true", help="tell what is in it, make nothing")
        parser.add_argument("--system", metavar="ID", help="which VM, if there are several in it")
        parser.add_argument("--sha256", metavar="HEX", help="checksum that FILE must have")
        parser.add_argument("--format", choices=tuple(_FORMATS), help="format of a disk")
        shape = parser.add_argument_group("instead of what is in it")
        shape.add_argument("--cpus", type=int, metavar="N", help="virtual CPUs")
        shape.add_argument("--memory", type=size, metavar="SIZE", help="such as 512M or 2G")
        shape.add_argument("--firmware", choices=("bios", "uefi", "kernel"), help="what boots")
        shape.add_argument("--image", metavar="IMAGE", help="whose kernel it boots")
        for name, what in (("secure-boot", "UEFI with signatures"), ("tpm", "a virtual TPM 2.0")):
            shape.add_argument(f"--{name}", action="store_true", default=None, help=what)
            shape.add_argument(
                f"--no-{name}",
                action="store_false",
                dest=name.replace("-", "_"),
                default=None,
                help="without",
            )
        shape.add_argument("--datastore", metavar="DATASTORE", help="where its disks are kept")
        shape.add_argument("--bus", choices=_BUSES, help="bus of all disks")
        shape.add_argument("--nic", choices=_NICS, help="kind of all network adapters")
        shape.add_argument(
            "--network",
            action="append",
            default=[],
            metavar="[NETWORK=]MODE",
            help="what a network of it, or all others, becomes: user, restricted, none",
        )
        shape.add_argument(
            "-l", "--label", action="append", type=label, default=[], metavar="KEY=VALUE"
        )
        parser.add_argument("--start", action="store_true", help="start it afterwards")
        parser.add_argument("--no-wait", action="store_true", help="print the task's id")

    def run(self, croft: Croft, args: Namespace) -> int:
        begun = time.monotonic()
        request = {} if args.look else _request(args)
        path = "/v1/imports/examine" if args.look else "/v1/imports"
        answer: Any = None
        for source in _sources(croft, args):
            try:
                answer = croft.api.post(path, {**source, **request})
                break
            except Exception as error:
                if "path" not in source or not _out_of_reach(error, source):
                    raise
        if args.look:
            return _show(croft, answer)
        task = answer
        if args.no_wait:
            if croft.json:
                croft.print_json(task)
            else:
                print(task["meta"]["id"])
            return OK
        task = wait(croft, [task])[0]
        if code := report_failures(croft, [task], started=args.start):
            return code
        vm = croft.api.get(f"/v1/vms/{quote(str(dig(task, 'spec.object.id')))}")
        notes = dig(task, "status.result.notes") or []
        if croft.json:
            croft.print_json({**vm, "notes": notes})
        else:
            _tell(croft, vm, notes, time.monotonic() - begun)
        return OK


def _request(args: Namespace) -> dict[str, Any]:
    """The API's ImportCreate, but for where it comes from."""
    names = ("cpus", "memory", "datastore", "firmware", "image", "secure_boot", "tpm", "bus", "nic")
    body: dict[str, Any] = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.vm is not None and args.name is not None and args.vm != args.name:
        raise UsageError("there are two names", "give one")
    if args.vm or args.name:
        body["name"] = args.vm or args.name
    if args.label:
        body["labels"] = dict(args.label)
    for given in args.network:
        network, _, mode = given.rpartition("=")
        if mode not in _MODES:
            raise UsageError(
                f"{given!r} does not say what becomes of a network",
                "write NETWORK=MODE or MODE, with user, restricted or none",
            )
        body.setdefault("networks", {})[network or "*"] = mode
    body["start"] = args.start
    return body


def _sources(croft: Croft, args: Namespace) -> Iterator[dict[str, Any]]:
    """The API's ImportSource, with its checksum but for a look: where the daemon may find the file;
    then, if it cannot, the file as it was sent."""
    path = args.file
    about: dict[str, Any] = {"system": args.system} if args.system else {}
    if args.format:
        about["format"] = _FORMATS[args.format]
    wanted = {} if args.look or args.sha256 is None else {"sha256": args.sha256}
    if path == "-":
        about["file"] = f"{args.vm or args.name or 'imported'}"
        yield _sent(croft, Pipe(sys.stdin.fileno()), about, args.look, wanted)
        return
    about["file"] = os.path.basename(path)[-200:]
    if os.path.isdir(path):
        raise UsageError(f"{path} is a directory", f"name the file in it: {path}/NAME.ovf")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if is_descriptor(path, os.pread(descriptor, 512, 0)):
            if wanted:
                raise UsageError("a checksum is of one file", "its manifest has those of its files")
            yield _sent(croft, bundle(path), about, args.look, wanted)
            return
        if "format" not in about and path.lower().endswith((".raw", ".img")):
            about |= _raw(descriptor, path)
        if croft.url is None and is_ours(croft.data):
            status = os.fstat(descriptor)
            stamp = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
            yield {**about, **wanted, "path": os.path.realpath(path), "stamp": stamp}
        yield _sent(croft, Files([(b"", descriptor)]), about, args.look, wanted)
    finally:
        os.close(descriptor)


def _sent(
    croft: Croft, source: Source, about: dict[str, Any], look: bool, wanted: dict[str, Any]
) -> dict[str, Any]:
    """What was sent: its own checksum goes with it, so that it arrives as it left."""
    sum = send(croft, f"send {about['file']}", source)
    return {**about, "upload": source.key, **({} if look else {"sha256": sum}), **wanted}


def _out_of_reach(error: Exception, source: dict[str, Any]) -> bool:
    """Whether the daemon sees another file there, or none: it may live in a container."""
    known = ours(error)
    if known is None or known.object != source["path"]:
        return False
    return known.code in ("not-found", "invalid", "stale", "forbidden")


def _raw(descriptor: int, path: str) -> dict[str, Any]:
    """A file called .raw is raw; one called .img is, unless it shows what else it is."""
    if path.lower().endswith(".img"):
        from undercroft.model.errors import InvalidError
        from undercroft.storage.formats import recognise

        try:
            recognise(descriptor)
        except InvalidError:
            return {"format": "raw"}
        return {}
    return {"format": "raw"}


def _show(croft: Croft, found: Any) -> int:
    """What is in a file, for people."""
    if croft.json:
        croft.print_json(found)
        return OK
    style = croft.out
    shape = f"{cpus(dig(found, 'cpus', 1))}, {text(dig(found, 'memory', 1 << 30))}"
    firmware = dig(found, "firmware", "bios")
    if dig(found, "secure_boot"):
        firmware += ", secure boot"
    lines = [
        ("is", f"{style.paint(found['name'], 'bold')} ({shape}, {firmware})"),
        ("system", dig(found, "system") or ""),
        ("product", dig(found, "product") or ""),
    ]
    for disk in dig(found, "disks", ()):
        what = f"{disk.get('format', '')} {disk['file']}".strip() if disk.get("file") else "empty"
        lines.append(("disk", f"{text(disk['size'])} on {disk.get('bus', 'sata')}: {what}"))
    lines += [("cdrom", f"a drive on {bus}, empty") for bus in dig(found, "cdroms", ())]
    for port in dig(found, "ports", ()):
        lines.append(("network", f"{port.get('network') or '-'} ({port.get('model', 'e1000e')})"))
    lines.append(("manifest", dig(found, "manifest") or "none"))
    lines += [("note", note) for note in dig(found, "notes", ())]
    for what, about in lines:
        if about:
            croft.say(f"  {style.paint(f'{what:<8}', 'dim')}  {about}")
    return OK


def _tell(croft: Croft, vm: Any, notes: list[str], took: float) -> None:
    """How it went."""
    style = croft.out
    name = str(dig(vm, "meta.name"))
    disks = len(dig(vm, "spec.disks", ()))
    shape = f"{cpus(dig(vm, 'spec.cpus'))}, {text(dig(vm, 'spec.memory'))}, "
    shape += "1 disk" if disks == 1 else f"{disks} disks"
    for note in notes:
        croft.note(f"note: {note}")
    state = str(dig(vm, "status.state"))
    croft.say(
        f"{style.paint(name, 'bold')} was imported, and is {style.state(state)} ({shape})   "
        f"{style.paint(elapsed(took), 'dim')}"
    )
    verb = "console" if state == "running" else "start"
    croft.say(f"  {style.paint('next', 'dim')}  {style.paint(f'croft {verb} {name}', 'cyan')}")
