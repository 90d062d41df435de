"""Templates: frozen VMs to make others from."""

from __future__ import annotations

import msgspec

from undercroft.model.base import Meta
from undercroft.model.checks import check_can_be_saved, check_moment
from undercroft.model.errors import AlreadyExistsError, InvalidError, StaleError, WrongStateError
from undercroft.model.names import check_name, new_id
from undercroft.model.requests import CloneRequest, TemplateCreate
from undercroft.model.task import Task
from undercroft.model.template import Template, TemplateSpec, TemplateState
from undercroft.model.vm import VM
from undercroft.operations.access import Caller
from undercroft.operations.context import (
    ATTEMPTS,
    Context,
    check_queue,
    find,
    new_event,
    scope,
)
from undercroft.operations.freezing import freezing_task
from undercroft.operations.vm_clone import clone_template
from undercroft.operations.vm_power import check_present
from undercroft.operations.volume_use import check_settled
from undercroft.store.interface import (
    Check,
    Claim,
    Delete,
    Listing,
    Put,
    Release,
    Transaction,
    Versioned,
)

MAX_DESCRIPTION = 1024


class TemplateOperations:
    """Every verb on templates."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(self, caller: Caller) -> Listing[Template]:
        """All templates but those that pass."""
        caller.require("template.view")
        listing = await self._context.store.list(Template)
        items = [item for item in listing.items if not item.record.spec.passing]
        return Listing(items, listing.revision)

    async def get(self, caller: Caller, ref: str) -> Versioned[Template]:
        """The template with this name or id."""
        caller.require("template.view")
        return await find(self._context.store, Template, ref)

    async def clone(self, caller: Caller, ref: str, request: CloneRequest) -> list[Task]:  # type: ignore[valid-type]
        """Makes VMs from a template; a task for each."""
        return await clone_template(self._context, caller, ref, request)

    async def create(self, caller: Caller, request: TemplateCreate) -> Task:
        """Makes a template of what a VM is now.

        Raises:
            WrongStateError: its memory is wanted, but it is switched off.
            AlreadyExistsError: the name is taken.
        """
        caller.require("template.create")
        check_name(request.name, "image")  # with a tag, as an image has: debian:12-warm
        if len(request.description) > MAX_DESCRIPTION:
            raise InvalidError(f"a description has at most {MAX_DESCRIPTION} characters")
        check_moment(request.memory, request.quiesce)
        context = self._context
        for _ in range(ATTEMPTS):
            found = await find(context.store, VM, request.source)
            vm = found.record
            check_present(vm)
            check_queue(vm)
            await check_settled(context, vm)
            if request.memory:
                check_has_memory(vm)
                check_can_be_saved(vm, "template")
            template = Template(
                meta=Meta(
                    id=new_id("template"),
                    name=request.name,
                    project=vm.meta.project,
                    created=context.clock(),
                ),
                spec=TemplateSpec(
                    host=context.host,
                    source=vm.meta.id,
                    description=request.description,
                    memory=request.memory,
                    quiesce=request.quiesce,
                ),
            )
            task = freezing_task(context, template, vm, caller.name)
            wanted = msgspec.structs.replace(vm, tasks=(*vm.tasks, task.meta.id))
            try:
                await context.store.transact(
                    Transaction(
                        checks=[Check(VM, vm.meta.id, found.revision)],
                        claims=[Claim(scope("template"), request.name, template.meta.id)],
                        puts=[Put(wanted), Put(template), Put(task)],
                    )
                )
            except StaleError:
                continue
            except AlreadyExistsError:
                raise AlreadyExistsError(
                    f"template {request.name} already exists",
                    object=f"template {request.name}",
                    action=f"choose another name, or: croft template rm {request.name}",
                ) from None
            return task
        raise StaleError(
            f"others keep changing vm {request.source}",
            object=f"vm {request.source}",
            action="try again",
        )

    async def remove(self, caller: Caller, ref: str) -> Template:
        """Removes a template. VMs that were made from it keep what they need of it.

        Raises:
            WrongStateError: it is just being made.
        """
        caller.require("template.remove")
        for _ in range(ATTEMPTS):
            found = await find(self._context.store, Template, ref)
            template = found.record
            if template.status.state is not TemplateState.READY:
                raise WrongStateError(
                    f"{template.label} is just being made",
                    object=template.label,
                    action="wait for it: croft task ls",
                    state=template.status.state,
                )
            name, id = template.meta.name, template.meta.id
            event = new_event(
                self._context.clock(),
                "template.removed",
                template,
                f"{template.label} was removed",
                by=caller.name,
            )
            try:
                await self._context.store.transact(
                    Transaction(
                        checks=[Check(Template, id, found.revision)],
                        deletes=[Delete(Template, id)],
                        releases=[]
                        if template.spec.passing
                        else [Release(scope("template"), name, id)],
                        puts=[Put(event)],
                    )
                )
            except StaleError:
                continue
            return template
        raise StaleError(f"others keep changing template {ref}", action="try again")


def check_has_memory(vm: VM) -> None:
    """Does nothing if there is a guest whose memory could be kept.

    Raises:
        WrongStateError: it is switched off.
    """
    if not vm.status.state.alive:
        raise WrongStateError(
            f"{vm.label} is {vm.status.state}, so it has nothing in memory",
            object=vm.label,
            action=f"start it, and let it settle: croft start {vm.meta.name}",
            state=vm.status.state,
        )
