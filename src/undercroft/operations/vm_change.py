"""Changing and removing VMs."""

from __future__ import annotations

import contextlib

import msgspec

from undercroft.model.checks import check_vm_spec
from undercroft.model.errors import (
    AlreadyExistsError,
    InvalidError,
    NotFoundError,
    StaleError,
    WrongStateError,
)
from undercroft.model.names import check_labels, check_name
from undercroft.model.requests import VMChange
from undercroft.model.task import Task
from undercroft.model.vm import VM, Firmware, Forward, Port, Power, VMSpec, VMState
from undercroft.model.volume import Volume
from undercroft.operations.access import Caller
from undercroft.operations.context import (
    ATTEMPTS,
    Context,
    check_unchanged,
    find,
    new_event,
    new_task,
    pending,
    scope,
)
from undercroft.operations.vm_create import assign_host_ports, port_claim
from undercroft.operations.vm_power import ask_to_cancel, check_present
from undercroft.store.interface import Check, Claim, Put, Release, Transaction, Versioned


async def change(
    context: Context, caller: Caller, ref: str, request: VMChange, if_match: int | None
) -> Versioned[VM]:
    """Writes new values into a VM's spec; its shape changes at the next start.

    Raises:
        InvalidError, UnsupportedError: the spec would make no sense. AlreadyExistsError: the name
        or a host port is taken. StaleError: the VM is no longer at revision ``if_match``.
    """
    caller.require("vm.change")
    if request.labels is not None:
        check_labels(request.labels)
    if request.name is not None:
        check_name(request.name)
    for _ in range(ATTEMPTS):
        found = await find(context.store, VM, ref)
        check_unchanged(found, if_match)
        check_present(found.record)
        if request == VMChange():
            return found
        if request.name is not None and found.record.status.state is VMState.CREATING:
            raise WrongStateError(
                f"{found.record.label} is being made, so it cannot be renamed",
                object=found.record.label,
                action="wait until it is there",
                state=found.record.status.state,
            )
        with contextlib.suppress(StaleError):
            return await _write(context, caller, found, request)
    raise StaleError(f"others keep changing vm {ref}", object=f"vm {ref}", action="try again")


async def _write(
    context: Context, caller: Caller, found: Versioned[VM], request: VMChange
) -> Versioned[VM]:
    vm = found.record
    new = request.name or vm.meta.name
    spec = await _changed_spec(context, vm.spec, request)
    check_vm_spec(spec)
    wanted = msgspec.structs.replace(
        vm,
        spec=spec,
        meta=msgspec.structs.replace(
            vm.meta,
            name=new,
            labels=vm.meta.labels if request.labels is None else request.labels,
            generation=vm.meta.generation + 1,
        ),
    )
    checks = [Check(VM, vm.meta.id, found.revision)]
    names = sorted(k for k, v in msgspec.structs.asdict(request).items() if v is not None)
    puts = [
        Put(wanted),
        Put(
            new_event(
                context.clock(),
                "vm.changed",
                wanted,
                f"{wanted.label} was changed: {', '.join(names)}",
                by=caller.name,
            )
        ),
    ]
    claims: list[Claim] = []
    releases: list[Release] = []
    if new != vm.meta.name:
        claims.append(Claim(scope("vm", vm.meta.project), new, vm.meta.id))
        releases.append(Release(scope("vm", vm.meta.project), vm.meta.name, vm.meta.id))
        await _rename_volumes(context, vm, new, checks, puts, claims, releases)
    before, after = _port_claims(context.host, vm.spec), _port_claims(context.host, spec)
    claims += [Claim(*key, vm.meta.id) for key in sorted(after - before)]
    releases += [Release(*key, vm.meta.id) for key in sorted(before - after)]
    try:
        revision = await context.store.transact(
            Transaction(checks=checks, claims=claims, puts=puts, releases=releases)
        )
    except AlreadyExistsError as taken:
        what = str(taken.data.get("name", ""))
        if str(taken.data.get("scope", "")).startswith("port/"):
            number = what.rpartition("/")[2]
            if not any(str(f.host_port) == number for f in request.forwards or ()):
                raise StaleError(f"port {number} was taken meanwhile") from None  # choose again
            what = f"port {number} of the host is already forwarded"
        else:
            what = f"the name {what} is taken"
        raise AlreadyExistsError(what, object=vm.label, action="choose another") from None
    return Versioned(wanted, revision)


async def _changed_spec(context: Context, spec: VMSpec, request: VMChange) -> VMSpec:
    names = (
        "cpus",
        "memory",
        "accelerator",
        "cpu_model",
        "display",
        "boot",
        "kernel_arguments",
        "restart",
        "stop_timeout",
    )
    values = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if values.get("kernel_arguments") and spec.firmware is not Firmware.KERNEL:
        raise InvalidError("kernel arguments need direct boot, which this VM does not use")
    if request.forwards is not None:
        values["ports"] = await _with_forwards(context, spec.ports, request.forwards)
    return msgspec.structs.replace(spec, **values)


async def _with_forwards(
    context: Context, ports: tuple[Port, ...], forwards: tuple[Forward, ...]
) -> tuple[Port, ...]:
    if not ports:
        raise InvalidError("a VM without a network adapter cannot have forwarded ports")
    stated = {(f.protocol, f.host_port) for f in forwards}
    kept = {
        (f.protocol, f.host_address, f.guest_port): f
        for f in ports[0].forwards
        if (f.protocol, f.host_port) not in stated
    }  # a forward that stays keeps the host port it was given
    wanted = tuple(
        kept.pop((f.protocol, f.host_address, f.guest_port), f) if f.host_port == 0 else f
        for f in forwards
    )
    return await assign_host_ports(
        context, (msgspec.structs.replace(ports[0], forwards=wanted), *ports[1:])
    )


async def _rename_volumes(
    context: Context,
    vm: VM,
    new: str,
    checks: list[Check],
    puts: list[Put],
    claims: list[Claim],
    releases: list[Release],
) -> None:
    for disk in vm.spec.disks:
        volume = await context.store.get(Volume, disk.volume)
        if volume is None or volume.record.spec.vm != vm.meta.id:
            continue
        if not volume.record.meta.name.startswith(f"{vm.meta.name}-"):
            continue
        old = volume.record.meta.name
        name = new + old.removeprefix(vm.meta.name)
        meta = msgspec.structs.replace(volume.record.meta, name=name)
        checks.append(Check(Volume, disk.volume, volume.revision))
        puts.append(Put(msgspec.structs.replace(volume.record, meta=meta)))
        claims.append(Claim(scope("volume"), name, disk.volume))
        releases.append(Release(scope("volume"), old, disk.volume))


def _port_claims(host: str, spec: VMSpec) -> set[tuple[str, str]]:
    return {port_claim(host, forward) for port in spec.ports for forward in port.forwards}


async def discard(context: Context, caller: Caller, id: str) -> None:
    """Has a VM go that is nobody's. One that somebody has taken over by now stays."""
    with contextlib.suppress(NotFoundError):
        await remove(context, caller, id, force=True, passing=True)


async def remove(
    context: Context, caller: Caller, ref: str, *, force: bool, passing: bool = False
) -> Task:
    """Writes that the VM is to go, with its volumes; a running one only with ``force``.
    ``passing``: only one that is nobody's.

    Raises:
        WrongStateError: it is running. NotFoundError: there is none.
    """
    caller.require("vm.remove")
    for _ in range(ATTEMPTS):
        found = await find(context.store, VM, ref)
        vm = found.record
        if passing and not vm.spec.passing:
            raise NotFoundError(f"{vm.label} is somebody's", object=vm.label)
        same = await pending(context.store, vm, ("vm.remove",))
        if same is not None:
            return same
        if not force and (vm.spec.power is not Power.STOPPED or vm.status.state.alive):
            state = vm.status.state
            raise WrongStateError(
                f"{vm.label} is {state}, so it cannot be removed",
                object=vm.label,
                action=f"stop it first, or: croft rm --force {vm.meta.name}",
                state=state,
            )
        task = new_task(context, "vm.remove", vm, caller.name)
        wanted = msgspec.structs.replace(
            vm,
            spec=msgspec.structs.replace(vm.spec, power=Power.STOPPED),
            status=msgspec.structs.replace(vm.status, state=VMState.REMOVING),
            tasks=(*vm.tasks, task.meta.id),
        )
        checks = [Check(VM, vm.meta.id, found.revision)]
        puts = [Put(wanted), Put(task)]
        await ask_to_cancel(context, vm, checks, puts)
        try:
            await context.store.transact(Transaction(checks=checks, puts=puts))
        except StaleError:
            continue
        return task
    raise StaleError(f"others keep changing vm {ref}", object=f"vm {ref}", action="try again")


def removal_releases(vm: VM, volumes: list[Volume]) -> list[Release]:
    """All names that a VM and its volumes hold, to be given back when they are gone."""
    releases = [Release(scope("vm", vm.meta.project), vm.meta.name, vm.meta.id)]
    releases += [Release(scope("volume"), v.meta.name, v.meta.id) for v in volumes]
    releases += [Release(*key, vm.meta.id) for key in sorted(_port_claims(vm.spec.host, vm.spec))]
    return releases
