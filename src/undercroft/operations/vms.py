"""VMs: looking at them and reaching into them. Making and switching are in the files beside."""

from __future__ import annotations

from collections.abc import AsyncIterator

from undercroft.model.errors import InvalidError, WrongStateError
from undercroft.model.requests import CloneRequest, ExecRequest, ExecResult, VMChange, VMCreate
from undercroft.model.task import Task
from undercroft.model.vm import VM, VMState
from undercroft.operations.access import Caller
from undercroft.operations.context import Context, find
from undercroft.operations.services import ByteStream, ConsoleSession
from undercroft.operations.vm_change import change, remove
from undercroft.operations.vm_clone import clone_vm
from undercroft.operations.vm_create import create
from undercroft.operations.vm_power import PowerOperations
from undercroft.store.interface import Listing, Versioned

MAX_EXEC_INPUT = 16 << 20
MAX_EXEC_ARGUMENTS = 1 << 17
MAX_LOG = 1 << 20


class VMOperations(PowerOperations):
    """Every verb on VMs."""

    async def create(self, caller: Caller, request: VMCreate) -> Task:
        """Creates a VM, and starts it if asked to."""
        return await create(self._context, caller, request)

    async def clone(self, caller: Caller, ref: str, request: CloneRequest) -> list[Task]:
        """Makes VMs that begin as what this one is; a task for each."""
        return await clone_vm(self._context, caller, ref, request)

    async def get(self, caller: Caller, ref: str) -> Versioned[VM]:
        """The VM with this name or id."""
        caller.require("vm.view")
        return await find(self._context.store, VM, ref)

    async def list(self, caller: Caller) -> Listing[VM]:
        """All VMs but those that pass."""
        caller.require("vm.view")
        listing = await self._context.store.list(VM)
        items = [item for item in listing.items if not item.record.spec.passing]
        return Listing(items, listing.revision)

    async def set(
        self, caller: Caller, ref: str, request: VMChange, if_match: int | None = None
    ) -> Versioned[VM]:
        """Changes a VM's spec."""
        return await change(self._context, caller, ref, request, if_match)

    async def remove(self, caller: Caller, ref: str, force: bool = False) -> Task:
        """Removes a VM with its volumes."""
        return await remove(self._context, caller, ref, force=force)

    async def exec(self, caller: Caller, ref: str, request: ExecRequest) -> ExecResult:
        """Runs a program in the guest and waits for its end.

        Raises:
            GuestAgentError: no agent answers. TimeLimitError: the program took longer.
        """
        vm = await self._running(caller, "vm.guest", ref)
        if not request.argv or not request.argv[0]:
            raise InvalidError("there is no program to run", action="name one after --")
        if sum(map(len, request.argv)) > MAX_EXEC_ARGUMENTS:
            raise InvalidError("the arguments are too long")
        if request.input is not None and len(request.input) > MAX_EXEC_INPUT:
            raise InvalidError("the input is larger than 16M", action="copy it with croft cp")
        if not 0 < request.timeout <= 86400:
            raise InvalidError("the time limit must lie between 0 and 86400 seconds")
        return await self._context.services.exec(vm, request)

    async def read_file(self, caller: Caller, ref: str, path: str) -> AsyncIterator[bytes]:
        """The content of a file in the guest, in pieces."""
        vm = await self._running(caller, "vm.guest", ref)
        return self._context.services.read_file(vm, _guest_path(path))

    async def write_file(
        self,
        caller: Caller,
        ref: str,
        path: str,
        content: AsyncIterator[bytes],
        mode: int | None = None,
    ) -> int:
        """Writes a file in the guest; returns its size in bytes."""
        vm = await self._running(caller, "vm.guest", ref)
        if mode is not None and not 0 <= mode <= 0o7777:
            raise InvalidError(f"{mode:o} is not a file mode")
        return await self._context.services.write_file(vm, _guest_path(path), content, mode)

    async def screenshot(self, caller: Caller, ref: str) -> bytes:
        """The VM's display as PNG."""
        vm = await self._running(caller, "vm.console", ref)
        return await self._context.services.screenshot(vm)

    async def console(self, caller: Caller, ref: str, scrollback: int = 0) -> ConsoleSession:
        """Attaches to the serial console; ``scrollback`` in bytes."""
        vm = await self._running(caller, "vm.console", ref)
        return await self._context.services.console(vm, max(0, min(scrollback, MAX_LOG)))

    async def vnc(self, caller: Caller, ref: str) -> ByteStream:
        """Attaches to the VM's display through VNC."""
        vm = await self._running(caller, "vm.console", ref)
        return await self._context.services.vnc(vm)

    async def log(self, caller: Caller, ref: str, limit: int = MAX_LOG) -> bytes:
        """The last bytes that the serial console printed."""
        caller.require("vm.console")
        vm = (await find(self._context.store, VM, ref)).record
        return await self._context.services.log(vm, max(0, min(limit, MAX_LOG)))

    async def _running(self, caller: Caller, privilege: str, ref: str) -> VM:
        caller.require(privilege)
        vm = (await find(self._context.store, VM, ref)).record
        if not vm.status.state.alive:
            raise WrongStateError(
                f"{vm.label} is {vm.status.state}, not running",
                object=vm.label,
                action=f"start it: croft start {vm.meta.name}",
                state=vm.status.state,
                needed=VMState.RUNNING,
            )
        return vm


def _guest_path(path: str) -> str:
    if not path.startswith("/") or "\0" in path or len(path) > 4096:
        raise InvalidError(
            f"{path[:80]!r} is not an absolute path in the guest", action="begin it with /"
        )
    return path


__all__ = ["Context", "VMOperations"]
