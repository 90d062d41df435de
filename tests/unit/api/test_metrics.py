from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.api.world import World, ask
from undercroft.api.statistics import MAX_SERIES, Statistics
from undercroft.client.client import Client
from undercroft.client.raw import Raw
from undercroft.model.errors import NotFoundError
from undercroft.model.requests import VMCreate, VMSample
from undercroft.model.vm import VMState


async def scrape(world: World) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels, read by Prometheus' own parser."""

    def work() -> str:
        with Raw(world.endpoint) as raw:
            response = raw.request("GET", "/metrics")
            assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            return response.read().decode()

    text = await asyncio.to_thread(work)
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), "a series came twice"
            found[sample.name][labels] = sample.value
    return found


async def test_what_is_measured(world: World) -> None:
    (vm,) = await world.add_vms(1, VMState.RUNNING)
    world.host.running = [
        VMSample(
            vm=vm.meta.id,
            name='we"b\\0',
            cpu_seconds=1.25,
            memory=3 << 30,
            disk_read_bytes=1,
            disk_write_bytes=2,
            disk_reads=3,
            disk_writes=4,
            net_receive_bytes=5,
            net_transmit_bytes=6,
        )
    ]
    await ask(world, lambda c: c.vms.create(VMCreate(name="x", disk=1 << 30)))
    found = await scrape(world)
    labels = (("id", vm.meta.id), ("vm", 'we"b\\0'))
    assert found["undercroft_vm_cpu_seconds_total"] == {labels: 1.25}
    assert found["undercroft_vm_memory_bytes"] == {labels: 3 << 30}
    assert found["undercroft_vm_disk_written_bytes_total"] == {labels: 2}
    assert found["undercroft_vm_network_transmit_bytes_total"] == {labels: 6}
    assert found["undercroft_vms"][(("state", "running"),)] == 1
    assert found["undercroft_vms"][(("state", "failed"),)] == 0
    assert (
        found["undercroft_vm_state"][(("id", vm.meta.id), ("state", "running"), ("vm", "web0"))]
        == 1
    )
    assert found["undercroft_tasks"][(("state", "pending"),)] == 1
    assert found["undercroft_host_memory_bytes"] == {(): 1 << 34}
    assert found["undercroft_store_revision"][()] >= 3
    assert found["process_resident_memory_bytes"][()] > 1 << 20


async def test_requests_are_counted_by_route(world: World) -> None:
    await world.add_vms(3)

    def work(client: Client) -> None:
        for number in range(3):
            client.vms.get(f"web{number}")
        with pytest.raises(NotFoundError):
            client.vms.get("none")
        for number in range(5):
            with pytest.raises(NotFoundError):
                client.raw.get(f"/nowhere/{number}")

    await ask(world, work)
    found = await scrape(world)
    requests = found["undercroft_api_requests_total"]
    key = (("method", "GET"), ("route", "/v1/vms/{ref}"))
    assert requests[(*key, ("status", "200"))] == 3
    assert requests[(*key, ("status", "404"))] == 1
    assert requests[(("method", "GET"), ("route", "none"), ("status", "404"))] == 5
    assert found["undercroft_api_request_seconds_count"][key] == 4
    buckets = found["undercroft_api_request_seconds_bucket"]
    assert buckets[(("le", "+Inf"), *key)] == 4
    bounds = [value for labels, value in buckets.items() if labels[1:] == key]
    assert bounds == sorted(bounds)


def test_series_are_bounded() -> None:
    statistics = Statistics()
    for number in range(MAX_SERIES * 2):
        statistics.count("GET", f"/{number}", 200, 0.1)
    assert len(statistics.requests) == MAX_SERIES
    assert len(statistics.latency) == MAX_SERIES
    statistics.count("GET", "/1", 200, 0.1)
    assert statistics.requests[("GET", "/1", 200)] == 2
