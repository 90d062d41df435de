"""What is sent in pieces: kept until it is whole and used, so that it can go on after an
interruption of either side."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from undercroft.model.errors import InvalidError
from undercroft.model.transfer import UploadStatus
from undercroft.operations.access import Caller
from undercroft.operations.context import Context

_KEY = re.compile(r"[0-9a-f]{16,64}")


class UploadOperations:
    """Every verb on uploads. The sender chooses the key: whoever sends the same again with the same
    key goes on."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def get(self, caller: Caller, key: str) -> UploadStatus:
        """How much of it is there (nothing: 0 bytes)."""
        caller.require("vm.create")
        return await self._context.services.upload_status(check_key(key))

    async def append(
        self, caller: Caller, key: str, offset: int, content: AsyncIterator[bytes]
    ) -> UploadStatus:
        """Adds what comes to what is there, which must be ``offset`` bytes.

        Raises:
            WrongStateError: it is not. BusyError: somebody else is sending the same.
            NoSpaceError: the disk is full; what was there is removed.
        """
        caller.require("vm.create")
        return await self._context.services.append_upload(check_key(key), offset, content)

    async def remove(self, caller: Caller, key: str) -> UploadStatus:
        """Forgets it; what it was."""
        caller.require("vm.create")
        return await self._context.services.remove_upload(check_key(key))


def check_key(key: str) -> str:
    """Returns a valid key unchanged.

    Raises:
        InvalidError: it is none.
    """
    if _KEY.fullmatch(key) is None:
        raise InvalidError(
            f"{key[:80]!r} is not the key of an upload",
            action="use 16 to 64 hexadecimal digits",
        )
    return key
