"""The helper that waits in a guest's memory for its clones: system calls that the host decides on.

The program itself, the protocol, and why it is so small, are in ``guesthelper.s``. It is put into
the guest by the guest agent before its memory is frozen, listens on a virtio-serial port of its
own, and ends when that port is closed. x86-64 Linux only.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from socket import socket

from undercroft.hypervisor import sockets
from undercroft.model.errors import GuestAgentError, TimeLimitError

__all__ = ["HELPER_ARCHITECTURES", "HELPER_PORT", "Batch", "GuestHelper", "Result", "start_script"]

HELPER_PORT = "org.undercroft.helper.0"
HELPER_ARCHITECTURES = ("x86_64",)
LARGEST = 0x10000  # bytes of a batch: SIZE in guesthelper.s
_HEADER = struct.Struct("<II")
_CALL = struct.Struct("<8Q")
_RESULT = struct.Struct("<q56x")
_MASK = (1 << 64) - 1

# In the guest: finds the port, puts the program where programs may be executed, and starts it there
# with the port as its standard input. (Its file goes with the first batch: only then has it begun.)
_START = r"""
for entry in /sys/class/virtio-ports/*; do
  [ -e "$entry/name" ] && read -r name < "$entry/name" && [ "$name" = {port} ] || continue
  for directory in /dev/shm /run /tmp /var/tmp /root; do
    program=$directory/.undercroft-helper
    (umask 077; printf '{octal}' > "$program" && chmod 700 "$program") || continue
    if "$program" < /dev/null; then
      (exec "$program" <> "/dev/${{entry##*/}}" > /dev/null &)
      echo "helper $program"
      break
    fi
    rm -f "$program"
  done
done
"""


@cache
def program() -> bytes:
    """The helper, as an ELF executable."""
    return files("undercroft.hypervisor").joinpath("guesthelper.bin").read_bytes()


def start_script() -> str:
    """A part of a shell script that starts the helper, and prints ``helper PATH`` if it does."""
    octal = "".join(f"\\{byte:03o}" for byte in program())
    return _START.format(port=HELPER_PORT, octal=octal)


@dataclass(frozen=True)
class Result:
    """Stands for what an earlier call of the same batch returned."""

    call: int


@dataclass
class Batch:
    """System calls to be carried out one after the other, whatever each returns.

    An argument is a number, bytes (the call gets their address), or the `Result` of an earlier
    call.
    """

    _calls: list[tuple[int, tuple[int | bytes | Result, ...]]] = field(default_factory=list)

    def call(self, number: int, *arguments: int | bytes | Result) -> Result:
        """Adds a call by its number (x86-64)."""
        if len(arguments) > 6:
            raise ValueError("a system call has at most six arguments")
        self._calls.append((number, arguments))
        return Result(len(self._calls) - 1)

    def encode(self) -> bytes:
        """The batch as the helper wants it.

        Raises:
            ValueError: it is larger than the helper takes.
        """
        place = _HEADER.size + _CALL.size * len(self._calls)
        calls, data = bytearray(), bytearray()
        for number, arguments in self._calls:
            values, flags = [0] * 6, 0
            for index, argument in enumerate(arguments):
                if isinstance(argument, bytes):
                    values[index] = place + len(data)
                    data += argument + bytes(-len(argument) % 8)
                    flags |= 1 << index
                elif isinstance(argument, Result):
                    values[index] = argument.call
                    flags |= 0x100 << index
                else:
                    values[index] = argument & _MASK
            calls += _CALL.pack(number, *values, flags)
        total = place + len(data)
        if total > LARGEST:
            raise ValueError(f"a batch of {total} bytes is too large")
        return _HEADER.pack(total, len(self._calls)) + bytes(calls) + bytes(data)

    @property
    def answer_size(self) -> int:
        """Bytes that the helper answers with."""
        return _HEADER.size + _CALL.size * len(self._calls)

    def results(self, answer: bytes) -> list[int]:
        """What the calls returned: a negative number is an error (errno(3))."""
        return [value for (value,) in _RESULT.iter_unpack(answer[_HEADER.size :])]


class GuestHelper:
    """Our end of the port. The other end is the guest's: its answers are only ever numbers."""

    def __init__(self, name: str, connection: socket) -> None:
        self.name = name
        self._connection = connection

    @classmethod
    def connect(cls, name: str, run_directory: Path) -> GuestHelper:
        """Connects to the port of a running VM.

        Raises:
            OSError: it has none, or somebody else is connected.
        """
        return cls(name, sockets.connect(run_directory / "helper.sock"))

    async def send(self, batch: Batch) -> None:
        """Sends a batch, which waits if the guest does not run yet.

        Raises:
            GuestAgentError: QEMU is gone.
        """
        try:
            await asyncio.get_running_loop().sock_sendall(self._connection, batch.encode())
        except OSError as error:
            raise self._broken(error) from error

    async def receive(self, batch: Batch, timeout: float) -> list[int]:
        """What the calls of a batch that was sent returned.

        Raises:
            GuestAgentError: the helper or QEMU is gone. TimeLimitError: no answer in time.
        """
        loop = asyncio.get_running_loop()
        answer = b""
        try:
            async with asyncio.timeout(timeout):
                while len(answer) < batch.answer_size:
                    left = batch.answer_size - len(answer)
                    data = await loop.sock_recv(self._connection, left)
                    if not data:
                        raise ConnectionResetError("it hung up")
                    answer += data
        except TimeoutError as error:
            message = f"the helper in {self.name} did not answer within {timeout:g} s"
            raise TimeLimitError(message, object=self.name) from error
        except OSError as error:
            raise self._broken(error) from error
        return batch.results(answer)

    def _broken(self, error: OSError) -> GuestAgentError:
        return GuestAgentError(f"the helper in {self.name} is gone: {error}", object=self.name)

    def close(self) -> None:
        """Hangs up: a helper that waits ends."""
        self._connection.close()
