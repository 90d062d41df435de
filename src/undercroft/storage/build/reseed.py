"""``/sbin/reseed`` of the tiny guest: has the kernel mix what is new in its pool of entropy into
its random numbers at once, instead of within a minute. A clone needs that (random(4),
RNDRESEEDCRNG), and busybox has nothing that does it.

It is so small that it is written down as machine code: a static ELF program for x86-64.
"""

from __future__ import annotations

import struct

__all__ = ["RESEED"]

_BASE = 0x400000
_HEADERS = 64 + 56
_PATH = b"/dev/urandom\0"
_CODE = bytes.fromhex(
    "b802000000"  # mov eax, 2 (open)
    "488d3d27000000"  # lea rdi, [rip + 39] (the path, behind the code)
    "be01000000"  # mov esi, 1 (O_WRONLY)
    "0f05"  # syscall
    "89c7"  # mov edi, eax
    "b810000000"  # mov eax, 16 (ioctl)
    "be07520000"  # mov esi, 0x5207 (RNDRESEEDCRNG)
    "31d2"  # xor edx, edx
    "0f05"  # syscall
    "85c0"  # test eax, eax
    "0f95c0"  # setnz al
    "0fb6f8"  # movzx edi, al
    "b83c000000"  # mov eax, 60 (exit)
    "0f05"  # syscall
)


def _program() -> bytes:
    code = bytearray(_CODE)
    after_lea = 5 + 7
    code[8:12] = struct.pack("<i", len(code) - after_lea)
    content = bytes(code) + _PATH
    size = _HEADERS + len(content)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        2,  # ET_EXEC
        62,  # EM_X86_64
        1,
        _BASE + _HEADERS,
        64,
        0,
        0,
        64,
        56,
        1,
        0,
        0,
        0,
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + content


RESEED = _program()
