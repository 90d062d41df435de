"""Prometheus' text format 0.0.4, made at each scrape from what is there then.

Written out here rather than through ``prometheus_client``, which keeps state of its own and takes
memory and time to import, while all that is needed is a page of text (docs/decisions).
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from undercroft.api.statistics import BUCKETS, Statistics
from undercroft.model.requests import VMSample
from undercroft.model.task import TaskState
from undercroft.model.vm import VM, VMState
from undercroft.operations.access import Caller
from undercroft.operations.core import Operations

MAX_VMS = 10_000
Labels = dict[str, str]


class Family(NamedTuple):
    """Samples of one meaning."""

    name: str
    type: str
    help: str
    samples: Iterable[tuple[str, Labels, float]]  # suffix of the name, labels, value


_PER_VM = (
    ("cpu_seconds_total", "counter", "CPU time its QEMU has used, in seconds.", "cpu_seconds"),
    ("memory_bytes", "gauge", "Memory its QEMU holds in the host.", "memory"),
    ("disk_read_bytes_total", "counter", "Bytes read from its disks.", "disk_read_bytes"),
    ("disk_written_bytes_total", "counter", "Bytes written to its disks.", "disk_write_bytes"),
    ("disk_reads_total", "counter", "Reads of its disks.", "disk_reads"),
    ("disk_writes_total", "counter", "Writes to its disks.", "disk_writes"),
    ("network_receive_bytes_total", "counter", "Bytes received.", "net_receive_bytes"),
    ("network_transmit_bytes_total", "counter", "Bytes sent.", "net_transmit_bytes"),
)


async def render_metrics(operations: Operations, caller: Caller, statistics: Statistics) -> bytes:
    """All metrics as text.

    Raises:
        ForbiddenError: the caller may not see VMs, hosts or tasks.
    """
    samples = sorted(await operations.hosts.samples(caller), key=lambda sample: sample.name)
    vms = await operations.vms.list(caller)
    tasks = await operations.tasks.list(caller)
    host = (await operations.hosts.get(caller, "self")).record
    states = dict.fromkeys(TaskState, 0)
    for item in tasks.items:
        states[item.record.status.state] += 1
    status = host.status
    families = [
        *_vm_families(samples[:MAX_VMS], [item.record for item in vms.items]),
        _gauge("host_cpus", "CPUs of the host.", status.cpus),
        _gauge("host_memory_bytes", "Memory of the host.", status.memory),
        _gauge("host_disk_bytes", "Size of the file system of the data.", status.disk_total),
        _gauge("host_disk_free_bytes", "Free in the file system of the data.", status.disk_free),
        Family(
            "undercroft_tasks",
            "gauge",
            "Tasks that are remembered, by state.",
            [("", {"state": str(state)}, count) for state, count in states.items()],
        ),
        _gauge("store_revision", "Revision of the store.", vms.revision),
        *_api_families(statistics),
        *_process_families(),
    ]
    return "".join(_render(family) for family in families).encode()


def _gauge(name: str, help: str, value: float) -> Family:
    return Family(f"undercroft_{name}", "gauge", help, [("", {}, value)])


def _vm_families(samples: Sequence[VMSample], vms: Sequence[VM]) -> Iterable[Family]:
    counts = dict.fromkeys(VMState, 0)
    for vm in vms:
        counts[vm.status.state] += 1
    yield Family(
        "undercroft_vms",
        "gauge",
        "VMs by state.",
        [("", {"state": str(state)}, count) for state, count in counts.items()],
    )
    yield Family(
        "undercroft_vm_state",
        "gauge",
        "The state that each VM is in (always 1).",
        [
            ("", {"vm": vm.meta.name, "id": vm.meta.id, "state": str(vm.status.state)}, 1)
            for vm in sorted(vms, key=lambda vm: vm.meta.name)[:MAX_VMS]
        ],
    )
    for name, type, help, field in _PER_VM:
        yield Family(
            f"undercroft_vm_{name}",
            type,
            help,
            [
                ("", {"vm": sample.name, "id": sample.vm}, getattr(sample, field))
                for sample in samples
            ],
        )


def _api_families(statistics: Statistics) -> Iterable[Family]:
    yield Family(
        "undercroft_api_requests_total",
        "counter",
        "Requests answered.",
        [
            ("", {"method": method, "route": route, "status": str(status)}, count)
            for (method, route, status), count in sorted(statistics.requests.items())
        ],
    )
    found: list[tuple[str, Labels, float]] = []
    for (method, route), histogram in sorted(statistics.latency.items()):
        labels = {"method": method, "route": route}
        count = 0
        for bound, hits in zip((*BUCKETS, None), histogram.counts, strict=True):
            count += hits
            le = "+Inf" if bound is None else repr(bound)
            found.append(("_bucket", {**labels, "le": le}, count))
        found.append(("_sum", labels, histogram.total))
        found.append(("_count", labels, count))
    yield Family(
        "undercroft_api_request_seconds", "histogram", "Time until a request was answered.", found
    )
    yield _gauge(
        "api_streams", "Event streams and consoles that are open.", statistics.open_streams
    )


def _process_families() -> Iterable[Family]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    yield Family(
        "process_cpu_seconds_total",
        "counter",
        "CPU time of the daemon, in seconds.",
        [("", {}, usage.ru_utime + usage.ru_stime)],
    )
    yield Family(
        "process_resident_memory_bytes",
        "gauge",
        "Memory of the daemon.",
        [("", {}, pages * os.sysconf("SC_PAGE_SIZE"))],
    )
    yield Family(
        "process_open_fds",
        "gauge",
        "Open descriptors of the daemon.",
        [("", {}, len(os.listdir("/proc/self/fd")))],
    )


def _render(family: Family) -> str:
    lines = [f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.type}\n"]
    for suffix, labels, value in family.samples:
        pairs = ",".join(f'{name}="{_escape(text)}"' for name, text in labels.items())
        number = str(int(value)) if value == int(value) else repr(float(value))
        lines.append(
            f"{family.name}{suffix}{{{pairs}}} {number}\n"
            if pairs
            else f"{family.name}{suffix} {number}\n"
        )
    return "".join(lines)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
