"""How volumes lie on each other, put together from what the store has."""

from __future__ import annotations

from undercroft.model.base import Ref
from undercroft.model.image import Image
from undercroft.model.layer import Layer
from undercroft.model.requests import Keeper, LayerNode, LayerTree
from undercroft.model.snapshot import Snapshot
from undercroft.model.template import Template
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.context import Context


async def layer_tree(context: Context) -> LayerTree:
    """All layers, the images that some lie on, and who needs them; parents come first."""
    store = context.store
    taken = await context.services.measure()
    layers = {item.record.meta.id: item.record for item in (await store.list(Layer)).items}
    heads = {
        item.record.status.head: Ref.to(item.record)
        for item in (await store.list(Volume)).items
        if item.record.status.head
    }
    vms = {item.record.meta.id: item.record.meta.name for item in (await store.list(VM)).items}
    kept: dict[str, list[Keeper]] = {}
    for snapshot in (await store.list(Snapshot)).items:
        for kept_disk in snapshot.record.status.disks:
            of = vms.get(snapshot.record.spec.vm)
            kept.setdefault(kept_disk.layer, []).append(_keeper(snapshot.record, of))
    for template in (await store.list(Template)).items:
        for frozen in template.record.status.disks:
            kept.setdefault(frozen.layer, []).append(_keeper(template.record))
    used = {layer.spec.image for layer in layers.values() if layer.spec.image}
    nodes = [
        LayerNode(
            id=image.meta.id,
            kind="image",
            name=image.meta.name,
            size=image.status.content.virtual_size if image.status.content else 0,
            allocated=image.status.size,
        )
        for image in [item.record for item in (await store.list(Image)).items]
        if image.meta.id in used
    ]
    for layer in _in_order(layers):
        id = layer.meta.id
        nodes.append(
            LayerNode(
                id=id,
                kind="layer",
                parent=layer.spec.parent or layer.spec.image,
                size=layer.spec.size,
                allocated=taken.get(id, 0),
                volume=heads.get(id),
                kept=tuple(kept.get(id, ())),
            )
        )
    return LayerTree(nodes=tuple(nodes))


def _keeper(record: Snapshot | Template, of: str | None = None) -> Keeper:
    return Keeper(kind=record.kind, id=record.meta.id, name=record.meta.name, of=of)


def _in_order(layers: dict[str, Layer]) -> list[Layer]:
    """Parents before their children, older ones first."""
    children: dict[str | None, list[Layer]] = {}
    for layer in sorted(layers.values(), key=lambda item: (item.meta.created, item.meta.id)):
        parent = layer.spec.parent if layer.spec.parent in layers else None
        children.setdefault(parent, []).append(layer)
    found: list[Layer] = []
    waiting = list(reversed(children.get(None, [])))
    while waiting:
        layer = waiting.pop()
        found.append(layer)
        waiting += reversed(children.get(layer.meta.id, []))
    return found
