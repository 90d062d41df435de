"""The QEMU command line while it is being put together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.plan import MachinePlan
from undercroft.hypervisor.secret import secret_id
from undercroft.model.vm import Machine

__all__ = ["Handle", "HandleKind", "Line", "escape"]


class HandleKind(StrEnum):
    """What a descriptor that QEMU is handed stands for."""

    READ = "read"  # a file, opened for reading
    WRITE = "write"  # a file, opened for reading and writing
    MEDIUM = "medium"  # a file of the user's, opened for reading if it can be in a CD-ROM drive
    LISTEN = "listen"  # a listening unix socket at `path`
    KEY = "key"  # of an encrypted layer, in a file that is only in memory
    TPM = "tpm"  # our end of the conversation with swtpm


@dataclass(frozen=True)
class Handle:
    """A descriptor to hand over. The command line says ``@name@`` where its number belongs."""

    name: str
    kind: HandleKind
    path: str

    @property
    def token(self) -> str:
        """What stands for the number until it is known."""
        return f"@{self.name}@"


def escape(value: object) -> str:
    """A value as QEMU's ``key=value,…`` syntax wants it: on/off, and commas doubled."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")


@dataclass
class Line:
    """Collects arguments and handles. Devices add themselves.

    ``sets`` maps a path to its fdset (see QEMU's ``-add-fd``), so that a file that two disks
    share beneath them is handed over once.
    """

    plan: MachinePlan
    emulator: Emulator
    argv: list[str] = field(default_factory=list)
    handles: list[Handle] = field(default_factory=list)
    _sets: dict[tuple[str, bool], int] = field(default_factory=dict)

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version, for what differs between releases."""
        return self.emulator.version

    @property
    def pci(self) -> bool:
        """Whether the board has a PCI Express bus (else virtio devices are memory-mapped)."""
        return self.plan.machine is not Machine.MICROVM

    @property
    def x86(self) -> bool:
        """Whether the guest is a PC."""
        return self.plan.arch in ("x86_64", "i386")

    def add(self, *arguments: str) -> None:
        """Adds arguments as they are."""
        self.argv.extend(arguments)

    def option(self, flag: str, head: str, /, **values: object) -> None:
        """Adds ``flag head,key=value,…``; values that are None are left out, and ``_`` in a key
        stands for ``-``."""
        parts = [escape(head)] if head else []
        parts += [
            f"{key.replace('_', '-')}={escape(value)}"
            for key, value in values.items()
            if value is not None
        ]
        self.add(flag, ",".join(parts))

    def device(self, driver: str, slot: Slot | None = None, /, **values: object) -> None:
        """Adds a device, at a fixed place on the PCI bus if the board has one."""
        place: dict[str, object] = {}
        if slot is not None and self.pci:
            place = {"bus": slot.bus, "addr": slot.address}
            if slot.shared:
                place["multifunction"] = True
        self.option("-device", driver, **{**values, **place})

    def virtio(self, kind: str, slot: Slot, /, **values: object) -> None:
        """Adds a virtio device for whichever bus the board has. On PCI it is a modern one only:
        the legacy registers cost I/O space and every guest since 2014 knows the modern ones."""
        if self.pci:
            self.device(f"virtio-{kind}-pci", slot, **{"disable_legacy": True, **values})
        else:
            self.device(f"virtio-{kind}-device", None, **values)

    def blockdev(self, node: Mapping[str, Any]) -> None:
        """Adds a node of the block graph."""
        self.add("-blockdev", json.dumps(node, separators=(",", ":")))

    def handle(self, name: str, kind: HandleKind, path: str) -> str:
        """Has something handed over; what stands for its number."""
        handle = Handle(name, kind, path)
        self.handles.append(handle)
        return handle.token

    def file(
        self, name: str, path: str, *, write: bool = False, kind: HandleKind = HandleKind.READ
    ) -> str:
        """Hands over a file in an fdset and gives the name by which QEMU opens it. ``kind``: how it
        is opened for reading.

        A writable one comes with a second, read-only descriptor: QEMU picks the one whose access
        mode fits, and wants either when it reopens a node.
        """
        number = self._sets.get((path, write))
        if number is None:
            number = self._sets[path, write] = len(self._sets) + 1
            purposes = [kind, HandleKind.WRITE] if write else [kind]
            for purpose in purposes:
                token = self.handle(f"{name}.{purpose.value}", purpose, path)
                opaque = f"{name}:{purpose.value}"
                self.add("-add-fd", f"fd={token},set={number},opaque={escape(opaque)}")
        return f"/dev/fdset/{number}"

    def secret(self, node: str, path: str) -> None:
        """Hands over the key of a node; what QEMU calls it is `secret_id`."""
        token = self.handle(f"{node}.key", HandleKind.KEY, path)
        self.option("-object", "secret", id=secret_id(node), file=f"/dev/fd/{token}", format="raw")

    def listener(self, name: str) -> str:
        """Hands over a listening socket ``NAME.sock`` in the run directory."""
        path = PurePosixPath(self.plan.run_directory) / f"{name}.sock"
        return self.handle(name, HandleKind.LISTEN, str(path))


@dataclass(frozen=True)
class Slot:
    """A place on a bus. ``shared``: function 0 of a slot of which others are used too."""

    slot: int
    function: int = 0
    shared: bool = False
    bus: str = "pcie.0"

    @property
    def address(self) -> str:
        """As QEMU writes it: ``4.1``, in hexadecimal."""
        return f"0x{self.slot:x}.{self.function:x}"
