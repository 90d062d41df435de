"""Store files of earlier versions become such as this one knows."""

import contextlib
import json
import sqlite3
from pathlib import Path

from undercroft.model.layer import Layer, LayerSpec, LayerState
from undercroft.model.volume import Volume
from undercroft.store.sqlite import SQLiteStore
from undercroft.store.sqlite.migrations import MIGRATIONS


async def test_volumes_from_before_there_were_layers_have_one(tmp_path: Path):
    path = tmp_path / "store.db"
    store = await SQLiteStore.open(path, migrations=MIGRATIONS[:1])
    await store.close()
    old = {
        "meta": {"id": "vol-0123456789abcdef", "name": "web1-boot", "created": 7.0},
        "spec": {"size": 1 << 30, "image": "img-0123456789abcdef", "host": "host-1", "vm": "vm-1"},
        "status": {"state": "ready", "allocated": 4096},
    }
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(
            "INSERT INTO record (kind, id, revision, value) VALUES ('volume', ?, 1, ?)",
            (old["meta"]["id"], json.dumps(old)),
        )
        db.execute("UPDATE state SET revision = 1")
        db.commit()
    store = await SQLiteStore.open(path)
    (volume,) = (await store.list(Volume)).items
    (layer,) = (await store.list(Layer)).items
    assert volume.record.status.head == layer.record.meta.id == "layer-0123456789abcdef"
    assert volume.record.spec.vm == "vm-1"
    assert layer.record.spec == LayerSpec(host="host-1", size=1 << 30, image="img-0123456789abcdef")
    assert layer.record.status.state is LayerState.READY
    await store.close()
