"""The task that makes a template of a VM, however it came to be wanted."""

from __future__ import annotations

import msgspec

from undercroft.model.names import new_id
from undercroft.model.snapshot import SnapshotSpec
from undercroft.model.task import Task
from undercroft.model.template import Template
from undercroft.model.vm import VM
from undercroft.operations.context import Context, new_task

__all__ = ["freezing_task"]


def freezing_task(context: Context, template: Template, vm: VM, by: str) -> Task:
    """The task of a VM's actor that makes a template of it."""
    snapshot = new_id("snapshot")
    spec = SnapshotSpec(
        vm=vm.meta.id,
        memory=template.spec.memory,
        quiesce=template.spec.quiesce,
        passing=True,
    )
    return new_task(
        context,
        "template.create",
        vm,
        by,
        template=template.meta.id,
        snapshot=snapshot,
        name=snapshot,
        spec=msgspec.to_builtins(spec),
    )
