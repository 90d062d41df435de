"""libvirt as a peer: a daemon of its own in namespaces of its own, on the same QEMU.

It runs in private mount, network and pid namespaces: nothing of the machine's is touched, and all
of it ends with its first process, which is killed when we end.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from bench.console import Listener
from bench.processes import clean_environment, cpu_seconds, die_with_parent, run
from undercroft.hypervisor.commandline import CommandLine
from undercroft.hypervisor.plan import MachinePlan

_PACKAGES = ("libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients")
_START_LIMIT = 120.0  # seconds; the first start asks QEMU for all it can do
_DIRECTORIES = (
    "etc/qemu/autostart",
    "run",
    "var/cache/libvirt",
    "var/lib/libvirt",
    "var/log/libvirt/qemu",
    "var/tmp",
)

# Binds its own /etc/libvirt, /run and /var; as pid 1 it reaps what libvirtd leaves to it.
_INIT = """
set -e
for pair in etc:/etc/libvirt run:/run var:/var passwd:/etc/passwd group:/etc/group; do
    mount --bind "$1/${pair%%:*}" "${pair#*:}"
done
"$2" --config "$1/etc/libvirtd.conf" --pid-file "$1/run/libvirtd.pid" &
wait $!
"""


class Unavailable(Exception):
    """The peer cannot be measured here; says why."""


def install() -> None:
    """Installs what is missing of libvirt. QEMU stays as it is: nothing is upgraded or removed.

    Raises:
        Unavailable: it is not to be had.
    """
    if os.geteuid() != 0:
        raise Unavailable("libvirt is measured as root only")
    if shutil.which("libvirtd") and shutil.which("virsh"):
        return
    if shutil.which("apt-get") is None:
        raise Unavailable("libvirtd and virsh are not installed")
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "--no-upgrade"]
    try:
        run(["env", "DEBIAN_FRONTEND=noninteractive", *command, "--no-remove", *_PACKAGES], 600.0)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error


def version() -> str:
    """As libvirtd tells it: ``9.0.0``."""
    found = re.search(r"\d+\.\d+\.\d+", run(["libvirtd", "--version"]).decode())
    return found[0] if found else "?"


class Libvirt:
    """A running libvirtd. Made by `libvirtd`.

    ``uri`` is what virsh is told to connect to; ``pid`` is the daemon's.
    """

    def __init__(self, base: Path, init: subprocess.Popen[bytes]) -> None:
        self.base = base
        self.uri = f"qemu+unix:///system?socket={base}/run/libvirt/libvirt-sock"
        self._init = init
        self.pid = 0

    def virsh(self, *words: str) -> list[str]:
        """The command line of virsh with these words."""
        return ["virsh", "--quiet", "--connect", self.uri, *words]

    def wait(self) -> None:
        """Until it answers.

        Raises:
            Unavailable: it ended, or does not.
        """
        deadline = time.monotonic() + _START_LIMIT
        while True:
            with contextlib.suppress(RuntimeError):
                run(self.virsh("capabilities"))
                break
            if self._init.poll() is not None or time.monotonic() > deadline:
                log = (self.base / "log").read_text(errors="replace").strip()
                raise Unavailable(f"libvirtd does not run: {log[-1000:]}")
            time.sleep(0.1)
        self.pid = self._find("libvirtd")

    def _find(self, name: str) -> int:
        """The pid, as we see it, of the process in its namespace that runs this program."""
        pids = [self._init.pid]
        while pids:
            pid = pids.pop()
            program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            if Path(program).name == name:
                return pid
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            pids += [int(child) for child in text.split()]
        raise Unavailable(f"no {name} runs there")

    def define(self, name: str, xml: str) -> None:
        """Makes a domain known."""
        path = self.base / f"{name}.xml"
        path.write_text(xml)
        run(self.virsh("define", str(path)))

    def start(self, name: str, serial: Path, line: bytes, cpu: list[float]) -> float:
        """Seconds from executing ``virsh start`` to the line on the domain's console; what
        processor time its QEMU had used by then is added to ``cpu``. The domain is gone again
        afterwards."""
        with Listener(serial) as console:
            began = time.perf_counter()
            process = subprocess.Popen(
                self.virsh("start", name),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=clean_environment(),
            )
            try:
                took = console.wait_for(line) - began
                cpu.append(cpu_seconds(self._find("qemu-system-x86_64"))[0])
                return took
            finally:
                if process.wait() == 0:
                    run(self.virsh("destroy", name))


@contextlib.contextmanager
def libvirtd(base: Path, known: list[str] | None = None) -> Iterator[Libvirt]:
    """A libvirtd on the directory ``base``, which keeps what is worth keeping for the next one
    (what libvirt learned of QEMU). ``known`` are domains (XML) that it finds when it starts.

    Raises:
        Unavailable: it does not run here.
    """
    _prepare(base)
    for xml in known or ():
        name = re.search("<name>(.+?)</name>", xml)
        assert name is not None
        (base / f"etc/qemu/{name[1]}.xml").write_text(xml)
    with (base / "log").open("wb") as log:
        init = subprocess.Popen(
            ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
             "--propagation", "private",
             "bash", "-c", _INIT, "bash", str(base), shutil.which("libvirtd") or "libvirtd"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**clean_environment(), "TMPDIR": "/tmp"},
            preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        peer = Libvirt(base, init)
        peer.wait()
        yield peer
    finally:
        init.kill()  # and with it, by --kill-child, the namespace and all that is in it
        init.wait()


def _prepare(base: Path) -> None:
    for name in _DIRECTORIES:
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "etc/libvirtd.conf").write_text(
        'unix_sock_group = "root"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n'
        'log_outputs = "3:stderr"\n'
    )
    (base / "etc/qemu.conf").write_text(
        'security_driver = "none"\nstdio_handler = "file"\nuser = "root"\ngroup = "root"\n'
        "dynamic_ownership = 0\nremember_owner = 0\ncgroup_controllers = []\nnamespaces = []\n"
    )
    for file, entry in (
        ("passwd", "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin"),
        ("group", "libvirt-qemu:x:64055:\nlibvirt:x:64056:\nkvm:x:64057:"),
    ):
        kept = [
            line
            for line in Path("/etc", file).read_text().splitlines()
            if not line.startswith(("libvirt", "kvm:"))
        ]
        (base / file).write_text("\n".join([*kept, entry]) + "\n")


def domain_xml(plan: MachinePlan, line: CommandLine, name: str, serial: Path) -> str:
    """A plan as a libvirt domain: the same board, kernel and devices at the same places as on its
    command line, and nothing that libvirt can be told to leave out.

    The user-mode network is added as QEMU's own arguments, because libvirt 9 cannot restrict it.
    """
    machine = f"pc-q35-{plan.machine_version}" if plan.machine_version else "q35"
    tcg = plan.accelerator == "tcg"
    network = "\n    ".join(
        f"<qemu:arg value={quoteattr(argument)}/>"
        for flag, value in pairwise(line.argv)
        if flag == "-netdev" or value.startswith("virtio-net-pci,")
        for argument in (flag, value)
    )
    cache = "<tcg><tb-cache unit='MiB'>256</tb-cache></tcg>" if tcg else ""

    def place(driver: str) -> str:
        device = next(argument for argument in line.argv if argument.startswith(f"{driver},"))
        found = re.search(r"\baddr=0x([0-9a-f]+)\.([0-9a-f])", device)
        if found is None:
            raise RuntimeError(f"{device} has no place on the bus")
        more = " multifunction='on'" if "multifunction=on" in device else ""
        return (
            f"<address type='pci' domain='0' bus='0' slot='0x{found[1]}' "
            f"function='0x{found[2]}'{more}/>"
        )

    if any(argument.startswith("VGA,") for argument in line.argv):
        screen = (
            f"<controller type='usb' model='qemu-xhci' ports='4'>{place('qemu-xhci')}</controller>"
            "<input type='tablet' bus='usb'/>"
            f"<video><model type='vga' vram='16384'/>{place('VGA')}</video>"
        )
    else:
        screen = "<controller type='usb' model='none'/><video><model type='none'/></video>"

    return f"""\
<domain type='{"qemu" if tcg else "kvm"}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{escape(name)}</name>
  <genid/>
  <memory unit='KiB'>{plan.memory // 1024}</memory>
  <vcpu>{plan.cpus}</vcpu>
  <os>
    <type arch='{plan.arch}' machine='{machine}'>hvm</type>
    <kernel>{escape(plan.kernel or "")}</kernel>
    <initrd>{escape(plan.initrd or "")}</initrd>
    <cmdline>{escape(plan.kernel_arguments)}</cmdline>
  </os>
  <features><acpi/><smm state='off'/><vmport state='off'/>{cache}</features>
  <cpu mode='{"maximum" if tcg else "host-passthrough"}'/>
  <clock offset='utc'>
    <timer name='rtc' tickpolicy='catchup'/>
    <timer name='hpet' present='no'/>
  </clock>
  <devices>
    <emulator>{escape(line.argv[0])}</emulator>
    {screen}
    <controller type='virtio-serial'>{place("virtio-serial-pci")}</controller>
    <serial type='unix'>
      <source mode='connect' path='{escape(str(serial))}'/>
      <target type='isa-serial' port='0'/>
    </serial>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <rng model='virtio'><backend model='builtin'/>{place("virtio-rng-pci")}</rng>
    <memballoon model='virtio' freePageReporting='on'>{place("virtio-balloon-pci")}</memballoon>
    <panic model='isa'/>
  </devices>
  <qemu:commandline>
    {network}
  </qemu:commandline>
</domain>
"""
