"""What makes the guest of an instant clone somebody else, as system calls that the host decides on.

Before a guest's memory is frozen a helper is put into it and looked up what there is to change
(`prepare`); in each clone the helper does it (`change_identity`), in the time that a guest without
any translated code needs for some thirty calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import struct
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec
import structlog

from undercroft.hypervisor.helper import Batch, GuestHelper, Result, start_script
from undercroft.hypervisor.machine import QemuMachine
from undercroft.model.base import Model
from undercroft.model.errors import UndercroftError
from undercroft.model.vm import VM

__all__ = [
    "GuestFacts",
    "Steps",
    "admit",
    "leave",
    "plan_steps",
    "prepare",
    "read_facts",
    "see_to_the_rest",
    "write_facts",
]

log = structlog.get_logger(__name__)

_FACTS = "guest.json"  # beside the frozen memory: what `prepare` found out
_REST_AFTER = 3.0  # seconds: each program that ends or begins in a new clone takes it a while
PREPARATION = 30.0  # seconds for the source's guest to start it
_MAX_HOSTS = 8 << 10  # bytes of /etc/hosts that are worth looking through

# Numbers and constants of x86-64 Linux: asm/unistd_64.h, fcntl.h, linux/random.h, linux/sockios.h.
_WRITE, _OPEN, _CLOSE, _IOCTL, _PWRITE, _SOCKET = 1, 2, 3, 16, 18, 41
_RENAME, _UNLINK, _SYMLINK, _MOUNT, _UMOUNT, _SETHOSTNAME = 82, 87, 88, 165, 166, 170
_MKDIR, _CHOWN, _FCHOWN, _CLOCK_SETTIME = 83, 92, 93, 227
_O_WRONLY, _O_CREAT, _O_TRUNC, _O_CLOEXEC = 0o1, 0o100, 0o1000, 0o2000000
_MS_BIND, _MNT_DETACH = 4096, 2
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_SIOCSIFHWADDR, _ARPHRD_ETHER = 0x8924, 1
_BOOT_FILE = b"/run/.undercroft-boot-id\0"
_BOOT_ID = b"/proc/sys/kernel/random/boot_id\0"
_SEED = 64  # bytes of new randomness
# What a guest says of itself is believed as far as it makes sense.
_FILES = ("/etc/machine-id", "/var/lib/dbus/machine-id", "/etc/hostname")
_KEY = re.compile("/etc/ssh/ssh_host_[a-z0-9_]{1,32}_key")
_MOST_KEYS = 8
_LONGEST = 255  # characters of anything
_CLOUD = re.compile("/[!-~]{1,256}/[!-.0-~]{1,255}")
_ID = re.compile("[0-9]{1,10}")

_LOOK = r"""
PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec 2>/dev/null
read -r name < /proc/sys/kernel/hostname; echo "hostname $name"
read -r boot < /proc/sys/kernel/random/boot_id; echo "boot $boot"
for net in /sys/class/net/*; do
  read -r mac < "$net/address" && echo "interface ${net##*/} $mac"
done
[ -s /etc/machine-id ] && echo "file /etc/machine-id"
[ -f /var/lib/dbus/machine-id ] && ! [ -L /var/lib/dbus/machine-id ] &&
  echo "file /var/lib/dbus/machine-id"
[ -f /etc/hostname ] && echo "file /etc/hostname"
for key in /etc/ssh/ssh_host_*_key; do [ -f "$key" ] && echo "key $key"; done
[ -L /var/lib/cloud/instance ] && echo "cloud $(readlink -f /var/lib/cloud/instance)"
[ -d /run/systemd/system ] && echo systemd
while IFS=: read -r name _ uid gid _ home shell; do
  case $shell in *sh) echo "user $name $uid $gid $home" ;; esac
done < /etc/passwd
[ -r /etc/hosts ] && while read -r line; do echo "hosts $line"; done < /etc/hosts
"""

# What can wait until the clone is there, for guests that have it.
_REST = r"""
PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec > /dev/null 2>&1
sync
ssh-keygen -A
systemctl --no-block try-reload-or-restart ssh sshd
systemctl --no-block try-restart systemd-journald
"""


class GuestFacts(Model, frozen=True, kw_only=True):
    """What a guest was like when it was frozen. ``interfaces`` maps MAC addresses to names;
    ``files`` are those of `_LOOK` that exist; ``keys`` SSH host keys, ``cloud`` the directory of
    cloud-init's instance, ``hosts`` the content of /etc/hosts; ``users`` those who may log in, with
    ids of user and group, and home; ``addresses`` the IP addresses, which a clone still has in a
    network of its own.

    ``program`` is the helper's file. ``random``, ``socket`` and ``boot_id`` are descriptors that
    the helper has open: the random number device, a socket, and the file that lies over the
    kernel's boot id.
    """

    hostname: str = ""
    program: str = ""
    boot: str = ""
    random: int = -1
    socket: int = -1
    boot_id: int = -1
    interfaces: dict[str, str] = {}
    files: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    cloud: str | None = None
    systemd: bool = False
    hosts: str = ""
    users: dict[str, tuple[int, int, str]] = {}
    addresses: tuple[str, ...] = ()


async def prepare(machine: QemuMachine) -> GuestFacts | None:
    """Has a helper wait in the guest, and looks at what its clones will have to change; None where
    that is not possible. The helper ends when ``machine.helper`` is closed.
    """
    agent = machine.agent
    if agent is None or not machine.plan.helper or agent.channel.present is False:
        return None
    try:
        machine.open_helper()
        script = _LOOK + start_script()
        found = await agent.exec(["/bin/sh"], input=script.encode(), timeout=PREPARATION, poll=0.05)
    except (UndercroftError, OSError) as error:
        log.info("no helper in the guest", vm=machine.name, error=str(error))
        machine.close_helper()
        return None
    facts = parse(found.stdout.decode(errors="replace"))
    if facts is not None and machine.helper is not None:
        with contextlib.suppress(UndercroftError):
            return await _hold(machine.helper, facts)
    machine.close_helper()
    return None


async def _hold(helper: GuestHelper, facts: GuestFacts) -> GuestFacts:
    """Has the helper open beforehand what clones will need. The boot id is the same as before, but
    comes from a file from now on. That stays: over one that is gone nothing can be mounted, as is
    done in a clone that is cloned."""
    batch = Batch()
    random = batch.call(_OPEN, b"/dev/urandom\0", _O_WRONLY | _O_CLOEXEC)
    socket = batch.call(_SOCKET, 2, 2 | _O_CLOEXEC, 0)
    boot = batch.call(_OPEN, _BOOT_FILE, _O_WRONLY | _O_CREAT | _O_TRUNC | _O_CLOEXEC, 0o444)
    content = f"{facts.boot}\n".encode()
    batch.call(_WRITE, boot, content, len(content))
    bound = batch.call(_MOUNT, _BOOT_FILE, _BOOT_ID, b"none\0", _MS_BIND, 0)
    batch.call(_UNLINK, facts.program.encode() + b"\0")
    await helper.send(batch)
    results = await helper.receive(batch, PREPARATION)
    return msgspec.structs.replace(
        facts,
        random=results[random.call],
        socket=results[socket.call],
        boot_id=results[boot.call] if _fine(results[bound.call]) else -1,
    )


async def leave(machine: QemuMachine, facts: GuestFacts | None) -> None:
    """Leaves a guest that `prepare` was done to as it was."""
    helper = machine.helper
    if helper is not None and facts is not None and facts.boot_id >= 0:
        batch = Batch()
        batch.call(_UMOUNT, _BOOT_ID, _MNT_DETACH)
        with contextlib.suppress(UndercroftError):
            await helper.send(batch)
            await helper.receive(batch, PREPARATION)
    machine.close_helper()


def parse(text: str) -> GuestFacts | None:
    """What `_LOOK` printed; None if no helper waits."""
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        values.setdefault(word, []).append(rest)
    if "helper" not in values:
        return None
    interfaces = {}
    for entry in values.get("interface", ()):
        name, _, mac = entry.partition(" ")
        if re.fullmatch("([0-9a-f]{2}:){5}[0-9a-f]{2}", mac) and 0 < len(name.encode()) < 16:
            interfaces[mac] = name
    hosts = "".join(f"{line}\n" for line in values.get("hosts", ()))
    return GuestFacts(
        hostname=values.get("hostname", [""])[0][:_LONGEST],
        program=values["helper"][0][:_LONGEST],
        boot=values.get("boot", [""])[0][:_LONGEST],
        interfaces=interfaces,
        files=tuple(file for file in _FILES if file in values.get("file", ())),
        keys=tuple(key for key in values.get("key", ()) if _KEY.fullmatch(key))[:_MOST_KEYS],
        cloud=next((path for path in values.get("cloud", ()) if _CLOUD.fullmatch(path)), None),
        systemd="systemd" in values,
        hosts=hosts if len(hosts) <= _MAX_HOSTS else "",
        users=dict(_user(entry) for entry in values.get("user", ())),
    )


def _user(entry: str) -> tuple[str, tuple[int, int, str]]:
    name, uid, gid, home = (*entry.split(" ", 3), "", "", "")[:4]
    if not _ID.fullmatch(uid) or not _ID.fullmatch(gid) or not home.startswith("/"):
        return name, (0, 0, "/nonexistent")
    return name, (int(uid), int(gid), home)


def write_facts(directory: Path, facts: GuestFacts | None) -> None:
    """Keeps the facts in ``directory``, or that there are none. Blocks."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / _FACTS
    if facts is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(msgspec.json.encode(facts))


def read_facts(directory: Path) -> GuestFacts | None:
    """The facts that are kept in ``directory``; None: no helper waits in what is frozen there."""
    try:
        return msgspec.json.decode((directory / _FACTS).read_bytes(), type=GuestFacts)
    except (OSError, msgspec.MsgspecError):
        return None


class Steps:
    """A batch, and what each of its calls must return for a part of the identity to be changed."""

    def __init__(self, facts: GuestFacts) -> None:
        self.facts = facts
        self.batch = Batch()
        self._wanted: list[tuple[Result, Callable[[int], bool], str]] = []

    def must(self, result: Result, share: str, good: Callable[[int], bool]) -> None:
        """If the call does not return what is ``good``, ``share`` is still shared."""
        self._wanted.append((result, good, share))

    def put(self, path: str, content: str, share: str | None = None) -> None:
        """Writes a file anew, if it is there."""
        data = content.encode()
        flags = _O_WRONLY | _O_TRUNC | _O_CLOEXEC
        file = self.batch.call(_OPEN, path.encode() + b"\0", flags)
        written = self.batch.call(_WRITE, file, data, len(data))
        self.batch.call(_CLOSE, file)
        if share is not None:
            self.must(written, share, lambda value: value == len(data))

    def shares(self, results: list[int]) -> tuple[str, ...]:
        """What the guest still shares with its source, after calls that returned this."""
        left = [share for result, good, share in self._wanted if not good(results[result.call])]
        return tuple(dict.fromkeys(left))


def _fine(value: int) -> bool:
    return value >= 0


def plan_steps(
    vm: VM, facts: GuestFacts, macs: Mapping[str, str], keys: Mapping[str, str], now: float
) -> Steps:
    """All that makes a clone of a guest with these facts ``vm``. ``macs``: old addresses and new
    ones; ``keys``: as `host_keys` makes them; ``now``: seconds since 1970."""
    steps = Steps(facts)
    call = steps.batch.call
    name = vm.spec.guest.hostname or vm.meta.name
    seconds = struct.pack("<qq", int(now), int(now % 1 * 1e9))
    call(_CLOCK_SETTIME, 0, seconds)
    seed = struct.pack("<ii", _SEED * 8, _SEED) + secrets.token_bytes(_SEED)
    call(_IOCTL, facts.random, _RNDADDENTROPY, seed)
    reseeded = call(_IOCTL, facts.random, _RNDRESEEDCRNG, 0)
    steps.must(reseeded, "random numbers (for a minute)", _fine)
    renamed = call(_SETHOSTNAME, name.encode(), len(name.encode()))
    steps.must(renamed, "hostname", _fine)
    identity = uuid.uuid4().hex
    for path in facts.files:
        is_name = path == "/etc/hostname"
        share = None if is_name else "machine-id"
        steps.put(path, f"{name if is_name else identity}\n", share)
    _rename_hosts(steps, facts, name)
    boot = f"{uuid.uuid4()}\n".encode()
    written = call(_PWRITE, facts.boot_id, boot, len(boot), 0)
    steps.must(written, "boot id", _fine)
    for old, new in macs.items():
        interface = facts.interfaces.get(old.lower())
        if interface is not None:
            address = bytes.fromhex(new.replace(":", ""))
            request = struct.pack("<16sH6s16x", interface.encode(), _ARPHRD_ETHER, address)
            changed = call(_IOCTL, facts.socket, _SIOCSIFHWADDR, request)
            steps.must(changed, "MAC address", _fine)
    _renew_keys(steps, facts, keys)
    if facts.cloud is not None:
        new = str(Path(facts.cloud).with_name(vm.meta.id))
        call(_RENAME, facts.cloud.encode() + b"\0", new.encode() + b"\0")
        call(_UNLINK, b"/var/lib/cloud/instance\0")
        linked = call(_SYMLINK, new.encode() + b"\0", b"/var/lib/cloud/instance\0")
        steps.must(linked, "cloud-init instance", _fine)
        steps.put("/var/lib/cloud/data/instance-id", f"{vm.meta.id}\n")
    return steps


def admit(steps: Steps, vm: VM) -> None:
    """Lets those log in whose keys the VM was given, as a first boot would have."""
    keys = vm.spec.guest.ssh_keys
    user = steps.facts.users.get(vm.spec.guest.user or "root")
    if not keys or user is None:
        return
    uid, gid, home = user
    call = steps.batch.call
    directory = f"{home}/.ssh".encode() + b"\0"
    call(_MKDIR, directory, 0o700)
    call(_CHOWN, directory, uid, gid)
    data = "".join(f"{key}\n" for key in keys).encode()
    flags = _O_WRONLY | _O_CREAT | _O_TRUNC | _O_CLOEXEC
    file = call(_OPEN, f"{home}/.ssh/authorized_keys".encode() + b"\0", flags, 0o600)
    call(_FCHOWN, file, uid, gid)
    written = call(_WRITE, file, data, len(data))
    call(_CLOSE, file)
    steps.must(written, "SSH keys that may log in", lambda value: value == len(data))


def _rename_hosts(steps: Steps, facts: GuestFacts, name: str) -> None:
    if not facts.hostname or facts.hostname == name:
        return
    old = re.compile(rf"(?<=\s){re.escape(facts.hostname)}(?![\w-])")
    hosts = old.sub(lambda _: name, facts.hosts)
    if hosts != facts.hosts and len(hosts) <= 2 * _MAX_HOSTS:
        steps.put("/etc/hosts", hosts)


def _renew_keys(steps: Steps, facts: GuestFacts, keys: Mapping[str, str]) -> None:
    for path in facts.keys:
        kind = path.removeprefix("/etc/ssh/ssh_host_").removesuffix("_key")
        if f"key_{kind}" in keys:
            steps.put(path, keys[f"key_{kind}"] + "\n", "SSH host keys")
            steps.put(path + ".pub", keys[f"public_{kind}"] + "\n")
        else:  # made anew by the guest itself, which may take it a while
            gone = steps.batch.call(_UNLINK, path.encode() + b"\0")
            steps.must(gone, "SSH host keys", _fine)
            steps.batch.call(_UNLINK, path.encode() + b".pub\0")


async def see_to_the_rest(
    machine: QemuMachine, facts: GuestFacts, quiet: Callable[[], Awaitable[None]]
) -> None:
    """What is of no hurry: services that hold on to what was changed, and the end of the helper.
    Where there are none it stays: it takes less than what its end takes to be emulated (25 ms, and
    2 MB of translated code). ``quiet``: returns when nobody has more need of the processors."""
    if not (facts.systemd or facts.keys):
        return
    await asyncio.sleep(_REST_AFTER)
    await quiet()
    machine.close_helper()
    if machine.agent is not None:
        await machine.agent.exec(["/bin/sh"], input=_REST.encode(), timeout=300.0)
