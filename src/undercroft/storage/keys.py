"""The keys of encrypted layers: a file for each, apart from what they open.

Made before the layer's file and removed before it, so that there is never a file without its key
that anybody needs, nor a key that outlives what was to be forgotten. All methods block.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from undercroft.model.errors import DataError
from undercroft.storage.files import disk_full_is_clear, sync_directory, write_durably

__all__ = ["Keys"]


class Keys:
    """The keys in a directory, by the ids of their layers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, layer: str) -> Path:
        """Where the key of a layer is, or would be: text of 64 characters, 256 random bits."""
        return self._directory / layer

    def make(self, layer: str) -> Path:
        """Makes the key of a layer, unless it is there.

        Raises:
            NoSpaceError: the disk is full.
        """
        path = self.path(layer)
        if not path.exists():
            self._write(path, secrets.token_hex(32).encode())
        return path

    def copy(self, layer: str, other: str) -> None:
        """Makes the key of a layer that of another, which it is a copy of.

        Raises:
            DataError: it is gone. NoSpaceError: the disk is full.
        """
        self._write(self.path(other), read_key(self.path(layer)))

    def remove(self, layer: str) -> None:
        """Removes a key; nothing happens if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            self.path(layer).unlink()
            sync_directory(self._directory)

    def known(self) -> list[str]:
        """The layers that there are keys of."""
        return sorted(name for name in os.listdir(self._directory) if not name.endswith(".half"))

    def _write(self, path: Path, key: bytes) -> None:
        half = path.with_name(f"{path.name}.half")
        with disk_full_is_clear("a key", self._directory):
            half.unlink(missing_ok=True)
            write_durably(half, key, 0o600)
            half.rename(path)
            sync_directory(self._directory)


def read_key(path: Path) -> bytes:
    """A key.

    Raises:
        DataError: it is gone.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the key of {path.name} cannot be read: {error.strerror}; without it nobody can read "
            "what is on the disk",
            object=f"layer {path.name}",
            action=f"restore {path} from a backup",
        ) from error
