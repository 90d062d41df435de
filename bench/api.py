"""The API's speed: one core serves, another asks, in the same run as a bare uvicorn.

    .venv/bin/python bench/api.py [--vms 1000] [--seconds 3]

Server and peer each run in a process of their own, pinned to one core, on a unix socket; the load
comes from this process on another core, over keep-alive connections. What the issue demands: at
least 2,000 GET/s of one VM and at most 40 ms for the list of 1,000, and 80 MB resident.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONNECTIONS = 8


# The servers


async def serve(directory: Path, vms: int) -> None:
    """Undercroft's API over a store with that many VMs, and a host that has nothing to do."""
    from undercroft.api.server import ApiServer
    from undercroft.model.base import Meta
    from undercroft.model.host import Host
    from undercroft.model.names import new_id, new_mac
    from undercroft.model.vm import VM, Disk, Forward, Port, VMSpec, VMState, VMStatus
    from undercroft.operations.context import Context
    from undercroft.operations.core import Operations
    from undercroft.store.datadir import DataDirectory
    from undercroft.store.interface import Claim, Put, Transaction
    from undercroft.store.sqlite import SQLiteStore

    data = DataDirectory.open(directory)
    store = await SQLiteStore.open(data.store_file)
    host = Host(meta=Meta(id=new_id("host"), name="here", created=1.0))
    records: list[VM | Host] = [host]
    for number in range(vms):
        spec = VMSpec(
            host=host.meta.id,
            image=new_id("image"),
            disks=(Disk(volume=new_id("volume")),),
            ports=(Port(mac=new_mac(), forwards=(Forward(guest_port=22, host_port=2000),)),),
        )
        meta = Meta(
            id=new_id("vm"), name=f"web{number}", created=time.time(), labels={"env": "prod"}
        )
        records.append(VM(meta=meta, spec=spec, status=VMStatus(state=VMState.STOPPED)))
    for start in range(0, len(records), 100):
        some = records[start : start + 100]
        await store.transact(
            Transaction(
                puts=[Put(record) for record in some],
                claims=[
                    Claim(f"{record.kind}/default", record.meta.name, record.meta.id)
                    for record in some
                ],
            )
        )
    services: object = None  # nothing here asks the host
    context = Context(store=store, host=host.meta.id, services=services)  # type: ignore[arg-type]
    server = ApiServer(Operations(context), data)
    await server.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def serve_hello(path: Path) -> None:
    """The peer: uvicorn with an application that does nothing."""
    import uvicorn

    body = b"x" * 1500

    async def hello(scope: object, receive: object, send: object) -> None:
        await send(  # type: ignore[operator]
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", b"1500"), (b"content-type", b"text/plain")],
            }
        )
        await send({"type": "http.response.body", "body": body})  # type: ignore[operator]

    print("ready", flush=True)
    uvicorn.run(
        hello,
        uds=str(path),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
    )


@contextmanager
def running(*arguments: str) -> Iterator[int]:
    """A server in a process of its own on the last core; yields its pid."""
    core = max(os.sched_getaffinity(0))
    child = subprocess.Popen(
        [sys.executable, __file__, *arguments, "--core", str(core)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise SystemExit("the server did not start")
        time.sleep(0.5)
        yield child.pid
    finally:
        child.terminate()
        child.wait()


# The load


def request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n".encode()


def length(data: bytes) -> int | None:
    """The length of the response that begins the data; None: its head is not complete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[:end].lower()
    if not head.startswith(b"http/1.1 200"):
        raise SystemExit(f"an answer that was not expected: {data[:400]!r}")
    at = head.index(b"content-length:") + 15
    return end + 4 + int(head[at:].split(b"\r\n", 1)[0])


def throughput(address: Path, paths: list[str], seconds: float) -> float:
    """Answers per second over `CONNECTIONS` connections that each ask again at once."""
    selector = selectors.DefaultSelector()
    buffers: dict[socket.socket, bytearray] = {}
    requests = [request(path) for path in paths]
    for number in range(CONNECTIONS):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(address))
        connection.send(requests[number % len(requests)])
        selector.register(connection, selectors.EVENT_READ)
        buffers[connection] = bytearray()
    count, begin = 0, time.perf_counter()
    while (now := time.perf_counter()) < begin + seconds:
        for key, _ in selector.select(1.0):
            connection = key.fileobj  # type: ignore[assignment]
            buffer = buffers[connection]
            buffer += connection.recv(1 << 18)
            wanted = length(bytes(buffer[:4096]))
            if wanted is not None and len(buffer) >= wanted:
                buffer.clear()
                count += 1
                connection.send(requests[count % len(requests)])
    for connection in buffers:
        connection.close()
    return count / (now - begin)


def latency(address: Path, path: str, times: int) -> list[float]:
    """Seconds for each of so many answers, one after the other."""
    found = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(address))
        for _ in range(times):
            begin = time.perf_counter()
            connection.sendall(request(path))
            buffer = bytearray()
            while (wanted := length(bytes(buffer[:4096]))) is None or len(buffer) < wanted:
                buffer += connection.recv(1 << 18)
            found.append(time.perf_counter() - begin)
    return found


def busy(pid: int) -> float:
    """CPU time that the server has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rate(address: Path, pid: int, paths: list[str], seconds: float) -> tuple[float, float]:
    """Answers per second, and answers per second of the server's CPU time: what one core gives
    when nothing else wants it."""
    before, begin = busy(pid), time.perf_counter()
    found = throughput(address, paths, seconds)
    count = found * (time.perf_counter() - begin)
    return found, count / max(busy(pid) - before, 0.01)


def resident(pid: int) -> int:
    """Memory in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the server is gone")


def measure(vms: int, seconds: float) -> dict[str, float]:
    """All figures; times in milliseconds, memory in MB."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        with running("--serve-hello", str(base / "hello.sock")) as pid:
            time.sleep(0.5)
            hello, hello_cpu = rate(base / "hello.sock", pid, ["/"], seconds)
        with running("--serve", str(base / "data"), "--vms", str(vms)) as pid:
            address = base / "data" / "run" / "api.sock"
            started = resident(pid) / 1e6
            names = [f"/v1/vms/web{number}" for number in range(0, vms, max(1, vms // 100))]
            throughput(address, names, 0.5)
            one, one_cpu = rate(address, pid, names, seconds)
            whole = latency(address, f"/v1/vms?limit={min(vms, 1000)}", 30)
            lean = "meta.name,status.state,status.addresses,spec.cpus,spec.memory"
            fields = latency(address, f"/v1/vms?limit={min(vms, 1000)}&fields={lean}", 30)
            some = latency(address, "/v1/vms?filter=meta.name~web1*&sort=-meta.created", 30)
            return {
                "hello_per_second": hello,
                "get_per_second": one,
                "hello_per_cpu_second": hello_cpu,
                "get_per_cpu_second": one_cpu,
                "get_ratio_to_hello": one_cpu / hello_cpu,
                "list_ms": statistics.median(whole) * 1000,
                "list_fields_ms": statistics.median(fields) * 1000,
                "list_filter_sort_ms": statistics.median(some) * 1000,
                "resident_at_start_mb": started,
                "resident_mb": resident(pid) / 1e6,
            }


def main() -> None:
    """Measures, and prints a table (or JSON)."""
    parser = argparse.ArgumentParser(description="The API on one core, beside a bare uvicorn.")
    parser.add_argument("--vms", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve-hello", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    if arguments.serve_hello is not None:
        serve_hello(arguments.serve_hello)
    elif arguments.serve is not None:
        import structlog
        import uvloop

        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(20),
            cache_logger_on_first_use=True,
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(arguments.serve, arguments.vms))
    else:
        figures = measure(arguments.vms, arguments.seconds)
        if arguments.json:
            print(json.dumps(figures))
        else:
            for name, value in figures.items():
                print(f"{name:24} {value:10.2f}")


if __name__ == "__main__":
    main()
