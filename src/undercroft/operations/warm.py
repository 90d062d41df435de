"""Warm templates: what ``croft run`` goes on from by itself, instead of booting again.

When an image has been booted once, the host boots it once more by itself, as nobody's VM, and keeps
what is then in memory. The next VM of the same image and shape goes on from there. What makes two
VMs alike enough is their key.
"""

from __future__ import annotations

import hashlib

import msgspec

from undercroft.hypervisor.helper import HELPER_ARCHITECTURES
from undercroft.model.base import Meta
from undercroft.model.image import Image, ImageContent
from undercroft.model.names import new_id, new_mac
from undercroft.model.requests import CloneMode, VMCreate
from undercroft.model.task import Task
from undercroft.model.template import Template, TemplateSpec, TemplateState
from undercroft.model.vm import VM, Guest, Power, RestartPolicy, VMSpec
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import Context, new_task, scope
from undercroft.operations.freezing import freezing_task
from undercroft.store.interface import Check, Claim, Put, Transaction, Versioned

__all__ = ["begin", "find_warm", "going_on", "keep", "warm_key", "warm_templates"]

_MOST_KEYS = 16 << 10  # characters


def warm_key(
    request: VMCreate, vm: VM, volumes: list[Volume], content: ImageContent | None
) -> str | None:
    """What VMs have in common that can go on from the same memory; None: this one must boot.

    It must if its guest is to be told more at its first boot than a name and keys (also by a disc),
    if nobody could tell it afterwards (no agent), if it has secrets of its own in memory (a
    TPM), or if its disk is encrypted: the template would keep in the clear what its guest had read
    of that, and a key for good.
    """
    guest = vm.spec.guest
    if not request.start or request.cold or content is None or not content.agent:
        return None
    if guest.password_hash or guest.user_data or vm.spec.tpm or len(volumes) > 1:
        return None
    if any(volume.spec.encrypted for volume in volumes):
        return None
    if vm.spec.cdroms:
        return None
    if guest.user != (content.defaults.user if content.cloud_init else None):
        return None
    if sum(map(len, guest.ssh_keys)) > _MOST_KEYS:
        return None
    if vm.spec.arch not in HELPER_ARCHITECTURES or len(vm.spec.disks) != len(volumes):
        return None
    kept = [msgspec.structs.replace(volume.spec, vm=None) for volume in volumes]
    shape = msgspec.json.encode([vm.meta.project, _shape(vm.spec), kept])
    return hashlib.sha256(shape).hexdigest()[:16]


def _shape(spec: VMSpec) -> VMSpec:
    """A spec without what is only one VM's."""
    ports = (msgspec.structs.replace(port, mac="", forwards=()) for port in spec.ports)
    default = VMSpec(host=spec.host)
    return msgspec.structs.replace(
        spec,
        power=default.power,
        disks=tuple(msgspec.structs.replace(disk, volume="") for disk in spec.disks),
        ports=tuple(ports),
        guest=Guest(user=spec.guest.user),
        restart=default.restart,
        stop_timeout=default.stop_timeout,
    )


async def warm_templates(context: Context) -> list[Versioned[Template]]:
    """Those that were made by themselves."""
    return [item for item in (await context.store.list(Template)).items if item.record.spec.warm]


async def find_warm(context: Context, key: str) -> Versioned[Template] | None:
    """The template that a VM with this key can go on from, if there is one."""
    for item in await warm_templates(context):
        template = item.record
        if template.spec.warm == key and template.status.state is TemplateState.READY:
            return item if template.status.memory else None
    return None


def going_on(template: Template, vm: VM) -> dict[str, object]:
    """The arguments of a ``vm.create`` that goes on from a template."""
    shape = template.status.shape
    olds = shape.ports if shape is not None else ()
    macs = {old.mac: new.mac for old, new in zip(olds, vm.spec.ports, strict=True)}
    return {
        "template": template.meta.id,
        "source": template.label,
        "mode": CloneMode.INSTANT.value,
        "macs": macs,
    }


async def begin(context: Context, source: VM, key: str) -> VM:
    """Writes a VM that is like ``source``, but nobody's, and the task that makes and starts it.

    Raises:
        AlreadyExistsError: there is one. StaleError: the image is going.
    """
    spec = source.spec
    now = context.clock()
    id = new_id("vm")
    name = f"warm-{key[:8]}"
    found = await context.store.get(Volume, spec.disks[0].volume) if spec.disks else None
    image = await context.store.get(Image, spec.image or "")
    shape = _shape(spec)
    puts: list[Put] = []
    claims = [Claim(scope("vm", source.meta.project), name, id)]
    disks = shape.disks
    if found is not None:
        volume = Volume(
            meta=Meta(id=new_id("volume"), name=f"{name}-boot", created=now),
            spec=msgspec.structs.replace(found.record.spec, vm=id),
        )
        puts.append(Put(volume))
        claims.append(Claim(scope("volume"), volume.meta.name, volume.meta.id))
        disks = (msgspec.structs.replace(shape.disks[0], volume=volume.meta.id),)
    vm = VM(
        meta=Meta(id=id, name=name, project=source.meta.project, created=now),
        spec=msgspec.structs.replace(
            shape,
            power=Power.RUNNING,
            disks=disks,
            ports=tuple(msgspec.structs.replace(port, mac=new_mac()) for port in shape.ports),
            restart=RestartPolicy.NEVER,
            passing=True,
        ),
    )
    task = new_task(context, "vm.create", vm, SYSTEM.name, start=True)
    vm = msgspec.structs.replace(vm, tasks=(task.meta.id,))
    checks = [Check(Image, image.record.meta.id, image.revision)] if image is not None else []
    puts += [Put(vm), Put(task)]
    await context.store.transact(Transaction(checks=checks, claims=claims, puts=puts))
    return vm


async def keep(context: Context, vm: Versioned[VM], image: str, key: str) -> tuple[Template, Task]:
    """Writes that what such a VM has in memory is to be kept as a template.

    Raises:
        AlreadyExistsError: there is one. StaleError: the VM was changed meanwhile.
    """
    record = vm.record
    template = Template(
        meta=Meta(
            id=new_id("template"),
            name=f"{image}-warm-{key[:6]}",
            project=record.meta.project,
            created=context.clock(),
        ),
        spec=TemplateSpec(
            host=context.host,
            source=record.meta.id,
            description=f"made by itself, for: croft run {image}",
            memory=True,
            warm=key,
        ),
    )
    task = freezing_task(context, template, record, SYSTEM.name)
    wanted = msgspec.structs.replace(record, tasks=(*record.tasks, task.meta.id))
    await context.store.transact(
        Transaction(
            checks=[Check(VM, record.meta.id, vm.revision)],
            claims=[Claim(scope("template"), template.meta.name, template.meta.id)],
            puts=[Put(wanted), Put(template), Put(task)],
        )
    )
    return template, task
