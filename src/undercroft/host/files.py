"""Small work on files, for threads."""

from __future__ import annotations

import shutil
from pathlib import Path


def remove_tree(path: Path) -> None:
    """Removes a file or directory with all below it; nothing happens if it is not there.

    A symbolic link is removed, never followed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
