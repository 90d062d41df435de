"""Headers of disk image formats, read by our own careful code before any other program sees them.

Each module has ``inspect(image, limits)``, which either tells the size of the disk inside or
raises `HostileImageError`. Nothing is read beyond fixed bounds, whatever the header claims.
"""

from __future__ import annotations

from undercroft.storage.formats.common import Inspected, Limits
from undercroft.storage.formats.inspect import inspect, recognise

__all__ = ["Inspected", "Limits", "inspect", "recognise"]
