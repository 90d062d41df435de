"""What is counted for whom."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.host.test_layers import layer, snapshot, volume
from undercroft.host.layers import Uses
from undercroft.host.usage import split
from undercroft.model.snapshot import SnapshotState


@given(st.integers(1, 20), st.randoms(use_true_random=False))
def test_what_is_a_volumes_own_is_what_goes_with_it(count: int, rng: random.Random) -> None:
    ids = [f"layer{n}" for n in range(count)]
    layers = [layer(id, rng.choice([None, *ids[:n]]) if n else None) for n, id in enumerate(ids)]
    heads = rng.sample(ids, min(count, rng.randrange(1, 4)))
    volumes = [volume(f"v{n}", head) for n, head in enumerate(heads)]
    snapshots = [
        snapshot(f"s{n}", rng.choice(ids), "none", SnapshotState.READY)
        for n in range(rng.randrange(3))
    ]

    def collected(volumes: list[object]) -> Uses:
        uses = Uses(layers, volumes, snapshots)  # type: ignore[arg-type]
        while unneeded := uses.unneeded():
            uses.forget(unneeded)
        return uses

    before = collected([*volumes])
    taken = {id: 1 << n for n, id in enumerate(ids)}
    for item in volumes:
        own, shared = split(before, item.status.head, taken)
        after = collected([other for other in volumes if other is not item])
        gone = set(before.layers) - set(after.layers)
        assert own == sum(taken[id] for id in gone)
        at, whole = item.status.head, 0
        while at is not None:
            whole += taken[at]
            at = before.layers[at].spec.parent  # type: ignore[assignment]
        assert own + shared == whole
