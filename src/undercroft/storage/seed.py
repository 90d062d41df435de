"""The cloud-init seed: how a guest learns who it is (NoCloud datasource, cloud-init manual)."""

from __future__ import annotations

import asyncio
import io
import json
import os
import secrets
from pathlib import Path
from typing import Any

from undercroft.model.vm import Guest

__all__ = ["rewrite_seed", "seed_files", "write_seed"]

_LABEL = "cidata"
_BOUNDARY = "==undercroft-user-data=="


async def write_seed(
    path: Path, *, instance_id: str, hostname: str, guest: Guest, room: int = 0
) -> None:
    """Writes the seed as an ISO 9660 image with Joliet and Rock Ridge names, labelled ``cidata``;
    atomically, so that a crash leaves the old one or the new one. The file has ``room`` bytes, or
    as many as it needs.

    Raises:
        OSError: it cannot be written.
    """
    files = seed_files(instance_id, hostname, guest)
    await asyncio.to_thread(_write_iso, path, files, room)


async def rewrite_seed(path: Path, *, instance_id: str, hostname: str, guest: Guest) -> bool:
    """Writes another seed over one that a machine has open, and whose size it believes in. Whether
    there was room for it.

    Raises:
        OSError: it cannot be written.
    """
    files = seed_files(instance_id, hostname, guest)
    return await asyncio.to_thread(_overwrite_iso, path, files)


def seed_files(instance_id: str, hostname: str, guest: Guest) -> dict[str, bytes]:
    """The seed's files by name.

    YAML is a superset of JSON, so JSON is what is written. The user's own user-data is handed on
    unchanged, as a second part of a MIME message where there are settings of ours beside it.
    """
    meta = {"instance-id": instance_id, "local-hostname": hostname}
    network = {
        "version": 2,
        "ethernets": {"all": {"match": {"name": "e*"}, "dhcp4": True, "dhcp6": False}},
    }
    return {
        "meta-data": json.dumps(meta, indent=1).encode(),
        "user-data": _user_data(hostname, guest),
        "network-config": json.dumps(network, indent=1).encode(),
    }


def _user_data(hostname: str, guest: Guest) -> bytes:
    config: dict[str, Any] = {"hostname": hostname, "preserve_hostname": False}
    if "." in hostname:
        config["fqdn"] = hostname
    user: dict[str, Any] = {}
    if guest.user is not None:
        user = {
            "name": guest.user,
            "shell": "/bin/bash",
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "lock_passwd": guest.password_hash is None,
        }
        if guest.password_hash is not None:
            user["hashed_passwd"] = guest.password_hash
            config["ssh_pwauth"] = True
        if guest.ssh_keys:
            user["ssh_authorized_keys"] = list(guest.ssh_keys)
        config["users"] = [user]
    elif guest.ssh_keys:
        config["ssh_authorized_keys"] = list(guest.ssh_keys)
    ours = "#cloud-config\n" + json.dumps(config, indent=1) + "\n"
    if guest.user_data is None:
        return ours.encode()
    return _multipart((ours, guest.user_data)).encode()


def _multipart(parts: tuple[str, ...]) -> str:
    """A MIME message; cloud-init looks at each part's first line to see what it is, and merges the
    later cloud-config into the earlier by the rules in the part's header."""
    boundary = _BOUNDARY
    while any(boundary in part for part in parts):
        boundary = f"=={secrets.token_hex(16)}=="
    lines = [
        f'Content-Type: multipart/mixed; boundary="{boundary}"',
        "MIME-Version: 1.0",
        "",
    ]
    for part in parts:
        lines += [
            f"--{boundary}",
            'Content-Type: text/plain; charset="utf-8"',
            "X-Merge-Type: list(append)+dict(recurse_array)+str()",
            "",
            part,
        ]
    lines += [f"--{boundary}--", ""]
    return "\n".join(lines)


def _write_iso(path: Path, files: dict[str, bytes], room: int) -> None:
    half = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with half.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(_iso(files))
            file.truncate(max(file.tell(), room))
            file.flush()
            os.fsync(file.fileno())
        half.rename(path)
    finally:
        half.unlink(missing_ok=True)


def _overwrite_iso(path: Path, files: dict[str, bytes]) -> bool:
    content = _iso(files)
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if len(content) > size:
            return False
        file.write(content.ljust(size, b"\0"))
        return True


def _iso(files: dict[str, bytes]) -> bytes:
    import pycdlib  # heavy, and only needed here

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=_LABEL)
    for name, data in files.items():
        short = name.replace("-", "_").upper()[:8]
        iso.add_fp(
            io.BytesIO(data),
            len(data),
            f"/{short}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
        )
    content = io.BytesIO()
    iso.write_fp(content)
    iso.close()
    return content.getvalue()
