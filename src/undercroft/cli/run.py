"""``croft run``: from a name to a running system."""

from __future__ import annotations

import sys
import time

from undercroft.cli.cdroms import disc, host_path
from undercroft.cli.command import Command, Namespace, Parser, duration, label, size
from undercroft.cli.disks import disk_size, volume_use
from undercroft.cli.errors import OK, UsageError
from undercroft.cli.output import dig, elapsed
from undercroft.cli.progress import report_failures, wait
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft


class Run(Command):
    """``croft run IMAGE``"""

    description = """
        Creates a VM from an image and starts it. An image that is not here yet is built (tiny,
        debian:12) or fetched (croft image catalogue) first. What you leave out comes from the
        image.

        A guest with cloud-init gets your SSH keys, so that croft shell just works; its host name is
        the VM's. Its network leads out through this host and cannot be reached from outside, except
        through the ports that you publish.
    """
    examples = (
        ("croft run tiny --name first", "a Linux of a few megabytes"),
        ("croft run debian:12 --name web1 --cpus 2 --memory 1G --disk 10G", "a full Debian"),
        ("croft run tiny --disk 10G --disk 5G:scsi --volume data1", "with three disks"),
        ("croft run debian:12 --name web1 --publish 8080:80", "port 8080 here is its port 80"),
        ("croft run --disk 20G --memory 2G --cdrom netinst.iso --name new", "install from a disc"),
        ("croft run debian:12 --user-data cloud.yaml", "with a cloud-init file of yours"),
        ("croft run tiny --network none --console", "no network; look at it boot"),
        ("croft run win11 --firmware uefi --secure-boot --tpm --memory 4G", "for pickier guests"),
    )

    def arguments(self, parser: Parser) -> None:
        add = parser.add_argument
        add("image", nargs="?", metavar="IMAGE", help="what it is made from (croft image ls)")
        shape = parser.add_argument_group("shape")
        shape.add_argument("-n", "--name", help="its name (default: made from the image's)")
        shape.add_argument("-c", "--cpus", type=int, metavar="N", help="virtual CPUs")
        shape.add_argument("-m", "--memory", type=size, metavar="SIZE", help="memory: 512M, 2G")
        shape.add_argument(
            "-d",
            "--disk",
            action="append",
            type=disk_size,
            default=[],
            metavar="SIZE[:BUS]",
            help="size of its disk: 10G, 10G:nvme; several times: further, empty disks",
        )
        shape.add_argument(
            "--volume",
            action="append",
            type=volume_use,
            default=[],
            metavar="VOLUME[:BUS][:ro]",
            help="a volume that it is to have as well; several times",
        )
        shape.add_argument(
            "--cdrom",
            action="append",
            type=disc,
            default=[],
            metavar="ISO[:BUS]",
            help="a CD-ROM drive with this disc in it (a file on the daemon's host); several times",
        )
        shape.add_argument("--datastore", metavar="DATASTORE", help="where its disks are kept")
        shape.add_argument("--encrypt", action="store_true", help="encrypt its disks")
        shape.add_argument(
            "--restart", choices=("never", "on-failure", "always"), help="start again by itself?"
        )
        shape.add_argument(
            "--stop-timeout", type=duration, metavar="TIME", help="how long croft stop waits"
        )
        shape.add_argument(
            "-l",
            "--label",
            action="append",
            type=label,
            default=[],
            metavar="KEY=VALUE",
            help="a label to find it by; several times",
        )
        network = parser.add_argument_group("network")
        network.add_argument(
            "--network",
            choices=("user", "restricted", "none"),
            help="a way out (user, the default), none out (restricted), no adapter at all",
        )
        network.add_argument(
            "-p",
            "--publish",
            action="append",
            default=[],
            metavar="[ADDR:]HOST:GUEST",
            help="lead a port of this host to the guest; several times",
        )
        guest = parser.add_argument_group("guest (with cloud-init)")
        guest.add_argument("-u", "--user", help="account to make")
        guest.add_argument(
            "--ssh-key",
            action="append",
            default=[],
            metavar="FILE",
            help="public key that may log in (default: yours); several times",
        )
        guest.add_argument("--no-ssh-key", action="store_true", help="no key at all")
        guest.add_argument(
            "--password", action="store_true", help="ask for a password (or read it from a pipe)"
        )
        guest.add_argument("--hostname", metavar="NAME", help="(default: the VM's name)")
        guest.add_argument(
            "--user-data", metavar="FILE", help="cloud-init user-data; - reads stdin"
        )
        machine = parser.add_argument_group("machine")
        machine.add_argument("--machine", choices=("q35", "microvm", "virt"), help="board")
        machine.add_argument("--firmware", choices=("bios", "uefi", "kernel"), help="what boots")
        machine.add_argument(
            "--boot", choices=("disk", "cdrom"), help="what is tried first (disk, if not empty)"
        )
        machine.add_argument("--secure-boot", action="store_true", help="UEFI with signatures")
        machine.add_argument("--tpm", action="store_true", help="a virtual TPM 2.0")
        machine.add_argument("--display", choices=("none", "std", "virtio"), help="graphics")
        machine.add_argument("--accelerator", choices=("auto", "kvm", "tcg"), help="how it runs")
        machine.add_argument("--cpu-model", metavar="MODEL", help="CPU model of QEMU")
        machine.add_argument("--arch", help="architecture, where the image does not say")
        machine.add_argument("--kernel-arguments", metavar="TEXT", help="added at direct boot")
        after = parser.add_argument_group("afterwards")
        after.add_argument(
            "--cold",
            action="store_true",
            help="boot, even if it could go on from an earlier boot",
        )
        after.add_argument("--console", action="store_true", help="go to its console")
        after.add_argument("--no-start", action="store_true", help="only create it")
        after.add_argument("--detach", action="store_true", help="do not wait; print its name")

    def run(self, croft: Croft, args: Namespace) -> int:
        if args.image is None and not args.disk and not args.volume and not args.cdrom:
            raise UsageError(
                "croft run needs an IMAGE",
                "for instance: croft run tiny, croft run debian:12, see croft image ls",
            )
        begun = time.monotonic()
        request = _request(croft, args)
        image = None
        if args.image is not None:
            from undercroft.cli.fetch import ensure_image

            found = ensure_image(croft, args.image)
            if isinstance(found, int):
                return found
            image = found
            request["image"] = dig(image, "meta.id")
        content = dig(image, "status.content", {})
        request["guest"] = _guest(croft, args, content)
        task = croft.api.post("/v1/vms", request)
        name = str(dig(task, "spec.object.name"))
        if args.detach:
            if croft.json:
                croft.print_json(task)
            else:
                print(name)
            return OK
        task = wait(croft, [task])[0]
        if code := report_failures(croft, [task], started=not args.no_start):
            return code
        vm = croft.api.get(f"/v1/vms/{quote(str(dig(task, 'spec.object.id')))}")
        if croft.json:
            croft.print_json(vm)
        else:
            _tell(croft, vm, image, time.monotonic() - begun)
            if dig(task, "status.result.template"):
                note = "it went on from an earlier boot of its like (--cold boots)"
                croft.say(_line(croft, "warm", note))
        if args.console and not args.no_start:
            from undercroft.cli.console import attach

            return attach(croft, name)
        return OK


def _request(croft: Croft, args: Namespace) -> dict[str, Any]:
    """The API's VMCreate, but for image and guest."""
    from undercroft.cli.ports import parse_forwards

    names = ["name", "cpus", "memory", "datastore", "arch", "machine", "firmware", "accelerator"]
    names += ["cpu_model", "display", "boot", "kernel_arguments", "restart", "stop_timeout"]
    request: dict[str, Any] = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    request["start"] = not args.no_start
    if args.disk:
        first, *others = args.disk
        request["disk"] = first["size"]
        if "bus" in first:
            request["disk_bus"] = first["bus"]
        if others:
            request["disks"] = others
    if args.volume:
        request["volumes"] = args.volume
    if args.cdrom:
        request["cdroms"] = [
            {**drive, "path": host_path(croft, drive["path"])} for drive in args.cdrom
        ]
    if args.cold:
        request["cold"] = True
    if args.encrypt:
        request["encrypt"] = True
    if args.secure_boot:
        request["secure_boot"] = True
    if args.tpm:
        request["tpm"] = True
    if args.label:
        request["labels"] = dict(args.label)
    if args.publish:
        request["forwards"] = parse_forwards(args.publish)
    if args.network == "none":
        request["ports"] = []
    elif args.network is not None:
        request["ports"] = [{"mode": args.network}]
    return request


def _guest(croft: Croft, args: Namespace, content: dict[str, Any]) -> dict[str, Any]:
    """What the guest is told about itself."""
    from undercroft.cli.keys import default_keys, read_key

    guest: dict[str, Any] = {}
    if args.user:
        guest["user"] = args.user
    if args.hostname:
        guest["hostname"] = args.hostname
    if args.ssh_key:
        guest["ssh_keys"] = [key for text in args.ssh_key for key in read_key(text)]
    elif not args.no_ssh_key and content.get("cloud_init"):
        guest["ssh_keys"] = default_keys(croft)
    if args.user_data == "-":
        guest["user_data"] = sys.stdin.read()
    elif args.user_data:
        with open(args.user_data, encoding="utf-8") as file:
            guest["user_data"] = file.read()
    if args.password:
        from undercroft.cli.password import hash_password

        guest["password_hash"] = hash_password(_ask_password())
    return guest


def _ask_password() -> str:
    if not sys.stdin.isatty():
        password = sys.stdin.readline().rstrip("\n")
    else:
        from getpass import getpass

        password = getpass("password for the guest: ")
        if getpass("once more: ") != password:
            raise UsageError("the two passwords differ")
    if not password:
        raise UsageError("the password is empty")
    return password


def _tell(croft: Croft, vm: Any, image: Any, took: float) -> None:
    """How it went, and how to get in."""
    from undercroft.cli.keys import only_own_key
    from undercroft.cli.output import cpus
    from undercroft.cli.output import size as text
    from undercroft.cli.vms import forwards

    style = croft.out
    name = str(dig(vm, "meta.name"))
    shape = f"{cpus(dig(vm, 'spec.cpus'))}, {text(dig(vm, 'spec.memory'))}"
    if image is not None:
        shape += f", {dig(image, 'meta.name')}"
    state = str(dig(vm, "status.state"))
    croft.say(
        f"{style.paint(name, 'bold')} is {style.state(state)} ({shape})   "
        f"{style.paint(elapsed(took), 'dim')}"
    )
    if state != "running":
        croft.say(_line(croft, "start", f"croft start {name}"))
        return
    content = dig(image, "status.content", {})
    ways = [("console", f"croft console {name}", "(Ctrl-] leaves)")]
    ssh = next((f for f in forwards(vm) if f.get("guest_port") == 22), None)
    if ssh is not None and content.get("ssh"):
        user = dig(vm, "spec.guest.user")
        login = f"{user}@" if user else ""
        own = only_own_key(croft.environ)
        identity = f"-i {own} " if own and dig(vm, "spec.guest.ssh_keys") else ""
        address = ssh.get("host_address", "127.0.0.1")
        by_hand = f"or: ssh {identity}-p {ssh['host_port']} {login}{address}"
        ways.append(("shell", f"croft shell {name}", by_hand))
    if content.get("agent"):
        ways.append(("exec", f"croft exec {name} -- uname -a", ""))
    width = max(len(command) for _, command, _ in ways)
    for what, command, more in ways:
        croft.say(_line(croft, what, command, width, more))
    if network := _network(croft, vm):
        croft.say(_line(croft, "network", network))


def _line(croft: Croft, what: str, text: str, width: int = 0, more: str = "") -> str:
    style = croft.out
    value = style.paint(text, "cyan") if text.startswith("croft ") else text
    tail = f"{' ' * (width - len(text))}   {style.paint(more, 'dim')}" if more else ""
    return f"  {style.paint(f'{what:<8}', 'dim')}  {value}{tail}"


def _network(croft: Croft, vm: Any) -> str:
    from undercroft.cli.vms import forwards

    ports = dig(vm, "spec.ports", ())
    if not ports:
        return "none"
    kinds = {"user": "user-mode, a way out", "restricted": "restricted, no way out"}
    mode = ports[0].get("mode", "user")
    # Until the guest agent tells: what QEMU's own DHCP gives to the only guest of such a network.
    addresses = dig(vm, "status.addresses") or ["10.0.2.15"]
    texts = [*addresses, kinds.get(mode, mode)]
    shown = [
        f"{f.get('host_address', '127.0.0.1')}:{f['host_port']} {croft.out.arrow} {f['guest_port']}"
        + ("" if f.get("protocol", "tcp") == "tcp" else f"/{f['protocol']}")
        for f in forwards(vm)
        if f.get("guest_port") != 22
    ]
    if shown:
        texts.append(f"ports {', '.join(shown)}")
    return "; ".join(texts)
