"""The kinds of records that the store holds, by name."""

from __future__ import annotations

from undercroft.model.base import Record
from undercroft.model.checkpoint import Checkpoint
from undercroft.model.datastore import Datastore
from undercroft.model.event import Event
from undercroft.model.export import Export
from undercroft.model.host import Host
from undercroft.model.image import Image
from undercroft.model.layer import Layer
from undercroft.model.snapshot import Snapshot
from undercroft.model.task import Task
from undercroft.model.template import Template
from undercroft.model.vm import VM
from undercroft.model.volume import Volume

KINDS: dict[str, type[Record]] = {
    cls.kind: cls
    for cls in (
        VM,
        Volume,
        Layer,
        Datastore,
        Snapshot,
        Checkpoint,
        Template,
        Image,
        Export,
        Task,
        Event,
        Host,
    )
}
