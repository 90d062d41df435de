"""VMs through the API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import msgspec

from undercroft.client.decode import decode
from undercroft.client.noun import Noun
from undercroft.client.raw import Raw
from undercroft.client.websocket import WebSocket, open_websocket
from undercroft.model.requests import (
    CloneRequest,
    EjectRequest,
    ExecRequest,
    ExecResult,
    InsertRequest,
    NewCdrom,
    StopRequest,
    TaskList,
    VMChange,
    VMCreate,
)
from undercroft.model.task import Task
from undercroft.model.vm import VM

_PIECE = 256 << 10


class VMsClient(Noun[VM]):
    """VMs, see `undercroft.operations.vms`."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw, "/v1/vms", VM)

    def create(self, request: VMCreate) -> Task:
        """Makes a VM; the task's ``result`` and ``spec.object`` tell which."""
        response = self._raw.request(
            "POST",
            self._path,
            headers={"content-type": "application/json"},
            body=msgspec.json.encode(request),
        )
        return decode(response.read(), Task)

    def clone(self, ref: str, request: CloneRequest) -> Sequence[Task]:
        """Makes VMs that begin as what this one is; a task for each."""
        return decode(self._request("POST", ref, "/clone", json=request), TaskList).tasks

    def start(self, ref: str) -> Task:
        """Switches on."""
        return self._act(ref, "start")

    def stop(self, ref: str, request: StopRequest | None = None) -> Task:
        """Shuts down, or switches off."""
        return self._act(ref, "stop", request)

    def restart(self, ref: str, request: StopRequest | None = None) -> Task:
        """Shuts down and starts anew."""
        return self._act(ref, "restart", request)

    def reset(self, ref: str) -> Task:
        """Presses the reset button."""
        return self._act(ref, "reset")

    def pause(self, ref: str) -> Task:
        """Holds the CPUs; memory stays."""
        return self._act(ref, "pause")

    def resume(self, ref: str) -> Task:
        """Goes on after `pause` or `suspend`."""
        return self._act(ref, "resume")

    def suspend(self, ref: str) -> Task:
        """Writes the memory to disk and ends QEMU."""
        return self._act(ref, "suspend")

    def add_cdrom(self, ref: str, request: NewCdrom | None = None) -> Task:
        """Gives a VM a CD-ROM drive; the task's ``result`` has its number."""
        body = request or NewCdrom()
        return decode(self._request("POST", ref, "/cdroms", json=body), Task)

    def remove_cdrom(self, ref: str, drive: int) -> Task:
        """Takes a CD-ROM drive away from a VM."""
        return decode(self._request("DELETE", ref, f"/cdroms/{drive}"), Task)

    def insert(self, ref: str, request: InsertRequest, drive: int = 0) -> Task:
        """Puts a disc into a CD-ROM drive."""
        return decode(self._request("POST", ref, f"/cdroms/{drive}/insert", json=request), Task)

    def eject(self, ref: str, drive: int = 0, force: bool = False) -> Task:
        """Takes the disc out of a CD-ROM drive; ``force``: also if the guest has locked it."""
        body = EjectRequest(force=force)
        return decode(self._request("POST", ref, f"/cdroms/{drive}/eject", json=body), Task)

    def remove(self, ref: str, force: bool = False) -> Task:
        """Removes the VM and its disks; ``force``: also if it runs."""
        return decode(self._request("DELETE", ref, params={"force": force}), Task)

    def set(self, ref: str, change: VMChange, if_match: int | None = None) -> VM:
        """Changes a VM; with ``if_match`` only if it is still at this revision.

        Raises:
            StaleError: it changed meanwhile.
        """
        headers = {} if if_match is None else {"if-match": f'"{if_match}"'}
        return decode(self._request("PATCH", ref, json=change, headers=headers), VM)

    def exec(self, ref: str, request: ExecRequest) -> ExecResult:
        """Runs a program in the guest through its agent."""
        timeout = request.timeout + 30.0
        return decode(
            self._request("POST", ref, "/exec", json=request, timeout=timeout), ExecResult
        )

    def read_file(self, ref: str, path: str) -> Iterator[bytes]:
        """The content of a file in the guest, piece by piece. The request is sent at once, so that
        errors are raised here and not at the first piece."""
        response = self._raw.request("GET", self._url(ref, "/files"), params={"path": path})
        return response.chunks()

    def write_file(
        self,
        ref: str,
        path: str,
        content: bytes | Iterable[bytes] | BinaryIO,
        mode: int | None = None,
    ) -> int:
        """Writes a file in the guest and returns its size in bytes. ``mode`` such as 0o644."""
        params = {"path": path, "mode": None if mode is None else f"{mode:04o}"}
        response = self._raw.request(
            "PUT",
            self._url(ref, "/files"),
            params=params,
            headers={"content-type": "application/octet-stream"},
            body=pieces(content),
            timeout=600.0,
        )
        return int(json.loads(response.read())["size"])

    def screenshot(self, ref: str) -> bytes:
        """The display as PNG."""
        return self._request("GET", ref, "/screenshot")

    def log(self, ref: str, limit: int | None = None) -> bytes:
        """The last ``limit`` bytes of console output, also of a stopped VM."""
        return self._request("GET", ref, "/log", params={"bytes": limit})

    def console(self, ref: str, scrollback: int = 0) -> WebSocket:
        """The serial console, beginning with the last ``scrollback`` bytes of output."""
        return open_websocket(
            self._raw.transport, self._url(ref, "/console"), {"scrollback": scrollback}
        )

    def vnc(self, ref: str) -> WebSocket:
        """The display as an RFB stream (RFC 6143)."""
        return open_websocket(self._raw.transport, self._url(ref, "/vnc"), {}, "binary")

    def _act(self, ref: str, verb: str, request: StopRequest | None = None) -> Task:
        return decode(self._request("POST", ref, f"/{verb}", json=request), Task)


def pieces(content: bytes | Iterable[bytes] | BinaryIO) -> bytes | Iterable[bytes]:
    """What a request can send: bytes as they are, a file in pieces."""
    if isinstance(content, (bytes, bytearray, memoryview)):
        return bytes(content)
    read = getattr(content, "read", None)
    return content if read is None else iter(lambda: read(_PIECE), b"")
