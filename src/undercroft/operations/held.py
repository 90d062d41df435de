"""VMs held ready: nobody's, forked from a template and paused, until one like them is wanted.

Who wants one takes over the record, with its disks, its MAC addresses and the process that waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from undercroft.model.base import Meta
from undercroft.model.layer import Layer
from undercroft.model.names import new_id, new_mac
from undercroft.model.requests import CloneMode
from undercroft.model.template import Template, TemplateState
from undercroft.model.vm import VM, Power, RestartPolicy, VMState
from undercroft.model.volume import Volume, VolumeSpec
from undercroft.operations.access import ALL, Caller
from undercroft.operations.context import Context, new_task, scope
from undercroft.store.interface import Check, Claim, Put, Release, Transaction, Versioned

__all__ = ["POOL", "Held", "find_held", "prepare"]

POOL = Caller("pool", frozenset({ALL}))  # its tasks are not shown


@dataclass(frozen=True)
class Held:
    """A VM that is held ready, and its volumes."""

    vm: Versioned[VM]
    volumes: list[Versioned[Volume]] = field(default_factory=list)

    def become(self, vm: VM, volumes: list[Volume]) -> tuple[VM, list[Volume]]:
        """The same as what was composed anew, but with this one's disks, addresses and process."""
        own = self.vm.record
        ports = tuple(
            msgspec.structs.replace(port, mac=mine.mac)
            for port, mine in zip(vm.spec.ports, own.spec.ports, strict=True)
        )
        disks = tuple(
            msgspec.structs.replace(disk, volume=mine.volume)
            for disk, mine in zip(vm.spec.disks, own.spec.disks, strict=True)
        )
        taken = msgspec.structs.replace(
            vm,
            meta=msgspec.structs.replace(vm.meta, id=own.meta.id),
            spec=msgspec.structs.replace(vm.spec, ports=ports, disks=disks),
            status=msgspec.structs.replace(own.status, held=None),
        )
        renamed = [
            msgspec.structs.replace(
                mine.record,
                meta=msgspec.structs.replace(
                    new.meta, id=mine.record.meta.id, created=mine.record.meta.created
                ),
            )
            for mine, new in zip(self.volumes, volumes, strict=True)
        ]
        return taken, renamed

    @property
    def checks(self) -> list[Check]:
        """That nobody else has taken it over."""
        found = [Check(Volume, v.record.meta.id, v.revision) for v in self.volumes]
        return [Check(VM, self.vm.record.meta.id, self.vm.revision), *found]

    @property
    def releases(self) -> list[Release]:
        """The names that it had until now."""
        own = self.vm.record
        names = [
            Release(scope("volume"), v.record.meta.name, v.record.meta.id) for v in self.volumes
        ]
        return [Release(scope("vm", own.meta.project), own.meta.name, own.meta.id), *names]


async def find_held(
    context: Context, template: str, wanted: list[Volume], skip: set[str]
) -> Held | None:
    """One that waits on this template, with volumes where those that are ``wanted`` are to be, but
    none in ``skip`` (ids), to which it is added."""
    for id in context.services.held(template):
        found = await context.store.get(VM, id)
        if id in skip or found is None:
            continue
        vm = found.record
        if vm.status.held != template or vm.status.state is not VMState.CREATING or vm.tasks:
            continue
        read = [await context.store.get(Volume, disk.volume) for disk in vm.spec.disks]
        volumes = [volume for volume in read if volume is not None]
        if _are_like([volume.record.spec for volume in volumes], [v.spec for v in wanted]):
            skip.add(id)
            return Held(found, volumes)
    return None


def _are_like(found: list[VolumeSpec], wanted: list[VolumeSpec]) -> bool:
    """Whether volumes are where they are to be, and encrypted if they are to be."""
    return [spec.datastore for spec in found] == [spec.datastore for spec in wanted] and all(
        has.encrypted or not spec.encrypted for has, spec in zip(found, wanted, strict=True)
    )


async def prepare(context: Context, template: Template) -> VM | None:
    """Writes a VM that is to be held on a template, and the task that makes it; None where the
    template is gone.

    Raises:
        StaleError, AlreadyExistsError: others were quicker.
    """
    found = await context.store.get(Template, template.meta.id)
    shape = found.record.status.shape if found is not None else None
    if found is None or shape is None or found.record.status.state is not TemplateState.READY:
        return None
    now, id = context.clock(), new_id("vm")
    project = template.meta.project
    name = f"pool-{id.removeprefix('vm-')}"
    volumes = []
    for index, disk in enumerate(found.record.status.disks):
        below = await context.store.get(Layer, disk.layer)
        place = below.record.spec.datastore if below is not None else None
        volume = Volume(
            meta=Meta(id=new_id("volume"), name=f"{name}-{index}", created=now),
            spec=VolumeSpec(
                size=disk.size, image=disk.image, host=context.host, vm=id, datastore=place
            ),
        )
        volumes.append(volume)
    spec = msgspec.structs.replace(
        shape,
        power=Power.RUNNING,
        disks=tuple(
            msgspec.structs.replace(disk.disk, volume=volume.meta.id)
            for disk, volume in zip(found.record.status.disks, volumes, strict=True)
        ),
        ports=tuple(
            msgspec.structs.replace(port, mac=new_mac(), forwards=()) for port in shape.ports
        ),
        restart=RestartPolicy.NEVER,
        passing=True,
    )
    vm = VM(meta=Meta(id=id, name=name, project=project, created=now), spec=spec)
    task = new_task(
        context,
        "vm.create",
        vm,
        POOL.name,
        template=template.meta.id,
        source=template.label,
        mode=CloneMode.INSTANT.value,
        hold=True,
    )
    vm = msgspec.structs.replace(vm, tasks=(task.meta.id,))
    claims = [Claim(scope("vm", project), name, id)]
    claims += [Claim(scope("volume"), v.meta.name, v.meta.id) for v in volumes]
    await context.store.transact(
        Transaction(
            checks=[Check(Template, template.meta.id, found.revision)],
            claims=claims,
            puts=[Put(vm), Put(task), *(Put(volume) for volume in volumes)],
        )
    )
    return vm
