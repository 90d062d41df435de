"""Volumes as disks of VMs: attach, detach, resize, set."""

from __future__ import annotations

from argparse import ArgumentTypeError

from undercroft.cli.command import Command, Namespace, Parser, add_names, size
from undercroft.cli.errors import UsageError, ours
from undercroft.cli.output import dig
from undercroft.cli.output import size as text
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft

BUSES = ("virtio", "scsi", "sata", "nvme")


def disk_size(text: str) -> dict[str, Any]:
    """A new disk from ``10G`` or ``10G:scsi``."""
    amount, colon, bus = text.partition(":")
    return {"size": size(amount)} | ({"bus": _bus(bus)} if colon else {})


def volume_use(text: str) -> dict[str, Any]:
    """A volume to attach from ``data1``, ``data1:scsi``, ``data1:ro`` or ``data1:scsi:ro``."""
    name, *how = text.split(":")
    use: dict[str, Any] = {"volume": name}
    if how and how[-1] == "ro":
        use["read_only"] = True
        how.pop()
    if len(how) > 1:
        raise ArgumentTypeError(f"{text!r} is not VOLUME[:BUS][:ro]")
    return use | ({"bus": _bus(how[0])} if how else {})


def _bus(text: str) -> str:
    if text not in BUSES:
        raise ArgumentTypeError(f"there is no bus {text!r}: choose of {', '.join(BUSES)}")
    return text


def _no_wait(parser: Parser) -> None:
    parser.add_argument(
        "--no-wait", action="store_true", help="only ask for it; print the task's id"
    )


def _volume(task: Any) -> str:
    """The volume that a task, which is its VM's, is about."""
    return str(dig(task, "spec.arguments.name") or dig(task, "spec.object.name", ""))


def _ask(croft: Croft, ref: str, verb: str, body: Any, order: str | None = None) -> Any:
    """Asks for something of a volume. Who names a VM instead is told so, and the right ``order``
    if both are the wrong way round."""
    try:
        return croft.api.post(f"/v1/volumes/{quote(ref)}/{verb}", body)
    except Exception as error:
        known = ours(error)
        if known is None or known.code != "not-found" or known.object != f"volume {ref}":
            raise
        try:
            vm = croft.api.get(f"/v1/vms/{quote(ref)}")
            if order is not None:
                croft.api.get(f"/v1/volumes/{quote(body['vm'])}")
        except Exception as other:
            if ours(other) is None:
                raise
            raise error from None
        from undercroft.model.errors import InvalidError

        action = f"the order is VOLUME VM: {order}" if order is not None else None
        if action is None:
            has = [disk["volume"] for disk in dig(vm, "spec.disks", ())]
            volumes = croft.api.list("/v1/volumes", {"fields": "meta.id,meta.name"})
            names = [dig(v, "meta.name") for v in volumes if dig(v, "meta.id") in has]
            action = f"name a volume of it: {', '.join(names) or 'it has none'}"
        raise InvalidError(
            f"{ref} is a VM, not a volume", object=f"vm {ref}", action=action
        ) from None


class Attach(Command):
    """``croft volume attach VOLUME VM``"""

    description = """
        Gives a volume to a VM as a disk. A running guest has it at once; you find it there by its
        serial number, which begins like the volume's id without vol-: lsblk -o NAME,SIZE,SERIAL,
        or in tiny cat /sys/block/vdb/serial.
        While the VM runs, SATA disks cannot be attached, and a microvm takes none.
    """
    examples = (
        ("croft volume attach data1 web1", "as a virtio disk"),
        ("croft volume attach data1 web1 --bus nvme", "as an NVMe disk"),
        ("croft volume attach iso1 web1 --read-only", "the guest cannot write to it"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="VOLUME", help="which")
        parser.add_argument("vm", metavar="VM", help="to which VM")
        parser.add_argument("-b", "--bus", choices=BUSES, default="virtio", help="(virtio)")
        parser.add_argument("--read-only", action="store_true", help="it cannot be written to")
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        body = {"vm": args.vm, "bus": args.bus, "read_only": args.read_only}
        return act(
            croft,
            [args.name],
            lambda ref: _ask(
                croft, ref, "attach", body, f"croft volume attach {args.vm} {args.name}"
            ),
            lambda task: f"has {_volume(task)}",
            no_wait=args.no_wait,
        )


class Detach(Command):
    """``croft volume detach VOLUME…``"""

    description = """
        Takes volumes away from their VMs. Unmount them in the guest first: a running guest is asked
        to let go of the disk, and most do even if something is mounted. If it does not within 30
        seconds, the disk stays. The volume keeps what is on it, and from now on also outlives the
        VM that it was made with.
    """
    examples = (("croft volume detach data1", "from whichever VM has it"),)

    def arguments(self, parser: Parser) -> None:
        add_names(parser, "VOLUME")
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        return act(
            croft,
            args.names,
            lambda ref: _ask(croft, ref, "detach", {}),
            lambda task: f"no longer has {_volume(task)}",
            no_wait=args.no_wait,
        )


class Resize(Command):
    """``croft volume resize VOLUME SIZE``"""

    description = """
        Makes a volume larger. A running guest sees a larger disk at once; the file system on it is
        the guest's to enlarge (growpart, resize2fs, xfs_growfs). Snapshots keep the size they have.
        A volume cannot be made smaller.
    """
    examples = (
        ("croft volume resize data1 20G", "to 20G"),
        ("croft volume resize data1 +5G", "5G more than it has"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="VOLUME", help="which")
        parser.add_argument("size", metavar="SIZE", help="20G, or +5G for so much more")
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.power import act

        more = args.size.startswith("+")
        try:
            body = {"by" if more else "size": size(args.size.removeprefix("+"))}
        except ArgumentTypeError as error:
            raise UsageError(str(error), "for instance: 20G, +5G") from None
        return act(
            croft,
            [args.name],
            lambda ref: croft.api.post(f"/v1/volumes/{quote(ref)}/resize", body),
            _resized,
            no_wait=args.no_wait,
        )


def _resized(task: Any) -> str:
    now = text(dig(task, "spec.arguments.size"))
    own = dig(task, "spec.object.kind") == "volume"
    return f"has {now}" if own else f"has {_volume(task)} with {now}"


class Set(Command):
    """``croft volume set VOLUME``"""

    description = """
        Limits what a guest may do with a volume per second: operations and bytes, of reading and
        writing together or of each. A running guest is held to it at once. 0 takes a limit away.
    """
    examples = (
        ("croft volume set data1 --iops 500 --bandwidth 10M", "no more than that"),
        ("croft volume set data1 --write-bandwidth 5M", "of writing only"),
        ("croft volume set data1 --iops 100 --burst 30", "ten times as much, for 30 seconds"),
        ("croft volume set data1 --iops 0 --bandwidth 0", "no limits any more"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument("name", metavar="VOLUME", help="which")
        add = parser.add_argument
        add("--iops", type=int, metavar="N", help="operations per second")
        add("--read-iops", type=int, metavar="N", help="of reading")
        add("--write-iops", type=int, metavar="N", help="of writing")
        add("--bandwidth", type=rate, metavar="SIZE", help="bytes per second: 10M")
        add("--read-bandwidth", type=rate, metavar="SIZE", help="of reading")
        add("--write-bandwidth", type=rate, metavar="SIZE", help="of writing")
        add("--burst", type=int, metavar="SECONDS", help="for how long ten times as much is fine")
        _no_wait(parser)

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.detail import limits_text
        from undercroft.cli.power import act

        names = ["iops", "read_iops", "write_iops", "burst"]
        names += ["bandwidth", "read_bandwidth", "write_bandwidth"]
        body = {name: value for name in names if (value := getattr(args, name)) is not None}
        if not body:
            raise UsageError("nothing is to be changed", "for instance: --iops 500")

        def told(task: Any) -> str:
            limits = dig(croft.api.get(f"/v1/volumes/{quote(args.name)}"), "spec.limits", {})
            now = limits_text(limits) or "none"
            if dig(task, "spec.object.kind") == "volume":
                return f"has new limits: {now}"
            return f"keeps to the limits of {_volume(task)}: {now}"

        return act(
            croft,
            [args.name],
            lambda ref: croft.api.patch(f"/v1/volumes/{quote(ref)}", body),
            told,
            no_wait=args.no_wait,
        )


def rate(text: str) -> int:
    """Bytes per second from ``10M``; 0 for no limit."""
    return 0 if text.strip() == "0" else size(text)
