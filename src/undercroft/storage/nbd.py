"""A small NBD client: reads and writes a disk that QEMU exports on a unix socket, and asks it which
parts hold data or have changed.

The protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle,
structured replies, metadata contexts). All blocking, for use in one thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from undercroft.model.errors import HypervisorError, NoSpaceError

__all__ = ["ALLOCATION", "Extent", "NbdClient", "dirty_context"]

ALLOCATION = "base:allocation"
ZERO = 2  # flag of base:allocation: reads as zeroes
DIRTY = 1  # flag of qemu:dirty-bitmap

_OPT_GO, _OPT_STRUCTURED, _OPT_META = 7, 8, 10
_REP_ACK, _REP_META = 1, 4
_OPT_MAGIC = 0x49484156454F5054
_REPLY_MAGIC = 0x3E889045565A9
_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE, _STRUCTURED = 0x67446698, 0x668E33EF
_READ, _WRITE, _DISC, _FLUSH, _STATUS = 0, 1, 2, 3, 7
_ERROR_BIT = 1 << 15
_CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS = 1, 2, 5
_AHEAD = 4  # requests on their way at once
_MOST = 1 << 30  # bytes that one question about extents covers


def dirty_context(bitmap: str) -> str:
    """The metadata context of a dirty bitmap."""
    return f"qemu:dirty-bitmap:{bitmap}"


class Extent(NamedTuple):
    """A part of a disk, in bytes, with the flags of a context."""

    offset: int
    length: int
    flags: int


class NbdClient:
    """One connection to one export. ``size`` is that of the disk in bytes.

    Raises `HypervisorError` if the other side goes away or refuses, `NoSpaceError` if it cannot
    write for lack of room.
    """

    def __init__(self, connection: socket.socket, name: str, contexts: Sequence[str] = ()) -> None:
        connection.setblocking(True)
        connection.settimeout(120.0)
        self._socket = connection
        self._contexts: dict[int, str] = {}
        self._handle = 0
        self._offsets: dict[int, int] = {}
        try:
            self.size = self._negotiate(name, contexts)
        except OSError as error:
            raise _lost(error) from error

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self._socket.sendall(_REQUEST.pack(0x25609513, 0, _DISC, 0, 0, 0))
        self._socket.close()

    def abort(self) -> None:
        """Wakes up a thread that is blocked in here; may be called by another one."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # -- what is asked ----------------------------------------------------------------------

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytearray]]:
        """The content of ranges (offset, length; at most 32 MiB each), in their order, with their
        offsets; a few are asked for ahead."""
        asked: dict[int, tuple[int, int, int]] = {}
        order: deque[int] = deque()
        buffers: dict[int, bytearray] = {}
        source = iter(ranges)
        more = True
        try:
            while True:
                while more and len(order) < _AHEAD:
                    following = next(source, None)
                    if following is None:
                        more = False
                        break
                    handle = self._send(_READ, *following)
                    asked[handle] = (handle, *following)
                    buffers[handle] = bytearray(following[1])
                    order.append(handle)
                if not order:
                    return
                handle = order.popleft()
                offset = asked[handle][1] if handle in asked else self._offsets.pop(handle)
                while handle in asked:  # QEMU may answer them in another order
                    finished = self._receive(buffers, asked)
                    if finished is not None:
                        self._offsets[finished] = asked.pop(finished)[1]
                self._offsets.pop(handle, None)
                yield offset, buffers.pop(handle)
        except OSError as error:
            raise _lost(error) from error

    def extents(self, context: str, offset: int, length: int) -> Iterator[Extent]:
        """The parts of a range in the view of a context, in their order, without gaps."""
        end = offset + length
        try:
            while offset < end:
                handle = self._send(_STATUS, offset, min(end - offset, _MOST))
                for part in self._status(handle, context):
                    size = min(part[0], end - offset)
                    if size <= 0:
                        break
                    yield Extent(offset, size, part[1])
                    offset += size
        except OSError as error:
            raise _lost(error) from error

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Writes; it is durable after `flush`."""
        try:
            handle = self._next()
            head = _REQUEST.pack(0x25609513, 0, _WRITE, handle, offset, len(data))
            self._socket.sendall(head)
            self._socket.sendall(data)
            self._finish(handle)
        except OSError as error:
            raise _lost(error) from error

    def flush(self) -> None:
        """Makes what was written durable."""
        try:
            self._finish(self._send(_FLUSH, 0, 0))
        except OSError as error:
            raise _lost(error) from error

    # -- replies ----------------------------------------------------------------------------

    def _next(self) -> int:
        self._handle += 1
        return self._handle

    def _send(self, command: int, offset: int, length: int) -> int:
        handle = self._next()
        self._socket.sendall(_REQUEST.pack(0x25609513, 0, command, handle, offset, length))
        return handle

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        self._into(memoryview(data))
        return data

    def _into(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "the other side hung up")
            view = view[count:]

    def _chunk(self) -> tuple[int, int, int, int]:
        """The head of a reply: flags, type, handle, length of what follows."""
        (magic,) = struct.unpack(">I", self._exactly(4))
        if magic == _SIMPLE:
            code, handle = struct.unpack(">IQ", self._exactly(12))
            if code:
                raise _refused(code, "")
            return 1, 0, handle, 0
        if magic != _STRUCTURED:
            raise HypervisorError("the NBD server of QEMU talks nonsense")
        flags, kind, handle, length = struct.unpack(">HHQI", self._exactly(16))
        if kind & _ERROR_BIT:
            body = self._exactly(length)
            code, size = struct.unpack_from(">IH", body)
            raise _refused(code, bytes(body[6 : 6 + size]).decode(errors="replace"))
        return flags, kind, handle, length

    def _finish(self, wanted: int) -> None:
        flags, _, handle, length = self._chunk()
        self._exactly(length)
        if handle != wanted or not flags & 1:
            raise HypervisorError("the NBD server of QEMU answers something else")

    def _status(self, wanted: int, context: str) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        while True:
            flags, kind, handle, length = self._chunk()
            if handle != wanted:
                raise HypervisorError("the NBD server of QEMU answers something else")
            body = self._exactly(length)
            if kind == _CHUNK_STATUS:
                (id,) = struct.unpack_from(">I", body)
                if self._contexts.get(id) == context:
                    found = list(struct.iter_unpack(">II", body[4:]))
            if flags & 1:
                if not found:
                    raise HypervisorError(f"the NBD server of QEMU does not tell {context}")
                return found

    def _receive(
        self, buffers: dict[int, bytearray], asked: dict[int, tuple[int, int, int]]
    ) -> int | None:
        """Takes one part of a reply to a read; the handle if that was its last."""
        flags, kind, handle, length = self._chunk()
        if handle not in asked:
            raise HypervisorError("the NBD server of QEMU answers something else")
        start = asked[handle][1]
        if kind in (_CHUNK_DATA, _CHUNK_HOLE):
            (offset,) = struct.unpack(">Q", self._exactly(8))
            at = offset - start
            size = length - 8 if kind == _CHUNK_DATA else 0
            if at < 0 or at + size > len(buffers[handle]):
                raise HypervisorError("the NBD server of QEMU answers something else")
            if kind == _CHUNK_DATA:
                self._into(memoryview(buffers[handle])[at : at + size])
            else:
                self._exactly(4)  # a hole: the buffer is zeroes already
        else:
            self._exactly(length)
        return handle if flags & 1 else None

    # -- the beginning ----------------------------------------------------------------------

    def _negotiate(self, name: str, contexts: Sequence[str]) -> int:
        greeting = self._exactly(18)
        if greeting[:16] != b"NBDMAGICIHAVEOPT":
            raise HypervisorError("what answers is no NBD server")
        self._socket.sendall(struct.pack(">I", 3))
        export = name.encode()
        self._option(_OPT_STRUCTURED, b"")
        if contexts:
            wanted = b"".join(struct.pack(">I", len(c.encode())) + c.encode() for c in contexts)
            named = struct.pack(">I", len(export)) + export
            body = named + struct.pack(">I", len(contexts)) + wanted
            for kind, answer in self._option(_OPT_META, body):
                if kind == _REP_META:
                    (id,) = struct.unpack_from(">I", answer)
                    self._contexts[id] = bytes(answer[4:]).decode()
        missing = set(contexts) - set(self._contexts.values())
        if missing:
            raise HypervisorError(f"the NBD server of QEMU does not know {', '.join(missing)}")
        size = None
        for kind, answer in self._option(
            _OPT_GO, struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        ):
            if kind == 3 and answer[:2] == b"\0\0":
                (size,) = struct.unpack_from(">Q", answer, 2)
        if size is None:
            raise HypervisorError(f"the NBD server of QEMU does not export {name}")
        return int(size)

    def _option(self, option: int, body: bytes) -> list[tuple[int, bytearray]]:
        self._socket.sendall(struct.pack(">QII", _OPT_MAGIC, option, len(body)) + body)
        found: list[tuple[int, bytearray]] = []
        while True:
            magic, answered, kind, length = struct.unpack(">QIII", self._exactly(20))
            answer = self._exactly(length)
            if magic != _REPLY_MAGIC or answered != option:
                raise HypervisorError("what answers is no NBD server")
            if kind == _REP_ACK:
                return found
            if kind & (1 << 31):
                raise HypervisorError(
                    f"the NBD server of QEMU refused: {bytes(answer).decode(errors='replace')}"
                )
            found.append((kind, answer))


def _refused(code: int, text: str) -> HypervisorError | NoSpaceError:
    said = text or os.strerror(code)
    if code == errno.ENOSPC:
        return NoSpaceError(f"QEMU cannot write: {said}", action="make room, then try again")
    return HypervisorError(f"QEMU cannot read or write a disk: {said}")


def _lost(error: OSError) -> HypervisorError:
    return HypervisorError(
        f"the QEMU that reads or writes a disk went away: {error}", action="try again"
    )
