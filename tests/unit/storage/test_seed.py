import email
import io
import json
from pathlib import Path
from typing import Any

import pycdlib
from hypothesis import given
from hypothesis import strategies as st

from undercroft.model.vm import Guest
from undercroft.storage.seed import seed_files, write_seed

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMjRUBxdlnQKT4mXQXcSSNI6FAGYDHBQqVxZVnwyGuxY a@b"


def cloud_config(data: bytes) -> dict[str, Any]:
    first, _, rest = data.decode().partition("\n")
    assert first == "#cloud-config"
    found = json.loads(rest)
    assert isinstance(found, dict)
    return found


def parts(data: bytes) -> list[bytes]:
    """The parts of a MIME message, as cloud-init takes it apart."""
    payload: Any = email.message_from_bytes(data).get_payload()
    return [part.get_payload(decode=True) for part in payload]


def test_user_with_key_has_no_password():
    files = seed_files("i-7", "web1", Guest(user="alice", ssh_keys=(KEY,)))
    assert json.loads(files["meta-data"]) == {"instance-id": "i-7", "local-hostname": "web1"}
    config = cloud_config(files["user-data"])
    assert config["hostname"] == "web1"
    assert config["users"] == [
        {
            "name": "alice",
            "shell": "/bin/bash",
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "lock_passwd": True,
            "ssh_authorized_keys": [KEY],
        }
    ]
    assert "ssh_pwauth" not in config


def test_password_hash_unlocks_the_account():
    config = cloud_config(
        seed_files("i", "web1.example", Guest(user="bob", password_hash="$6$salt$hash"))[
            "user-data"
        ]
    )
    assert config["fqdn"] == "web1.example"
    assert config["ssh_pwauth"] is True
    (user,) = config["users"]
    assert user["hashed_passwd"] == "$6$salt$hash"
    assert user["lock_passwd"] is False


def test_keys_without_a_user_go_to_the_default_account():
    config = cloud_config(seed_files("i", "h", Guest(ssh_keys=(KEY,)))["user-data"])
    assert config["ssh_authorized_keys"] == [KEY]
    assert "users" not in config


def test_every_adapter_uses_dhcp():
    network = json.loads(seed_files("i", "h", Guest())["network-config"])
    assert network["version"] == 2
    assert all(adapter["dhcp4"] for adapter in network["ethernets"].values())


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=300))
def test_own_user_data_is_handed_on_unchanged(text: str):
    ours, theirs = parts(seed_files("i", "h", Guest(user_data=text))["user-data"])
    assert cloud_config(ours)["hostname"] == "h"
    assert theirs.decode() == text


def test_user_data_cannot_end_its_part():
    text = "#!/bin/sh\n--==undercroft-user-data==\n--==undercroft-user-data==--\necho still here\n"
    _, theirs = parts(seed_files("i", "h", Guest(user_data=text))["user-data"])
    assert theirs.decode() == text


async def test_the_iso_has_what_cloud_init_looks_for(tmp_path: Path):
    path = tmp_path / "seed.iso"
    guest = Guest(user="alice", user_data="#!/bin/sh\ntrue\n")
    await write_seed(path, instance_id="i-1", hostname="web1", guest=guest)
    await write_seed(path, instance_id="i-2", hostname="web1", guest=guest)  # replaced as a whole
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    try:
        assert iso.pvd.volume_identifier.decode().strip() == "cidata"
        expected = seed_files("i-2", "web1", guest)
        for name in ("meta-data", "network-config"):
            for kind in ("rr_path", "joliet_path"):
                out = io.BytesIO()
                iso.get_file_from_iso_fp(out, **{kind: f"/{name}"})
                assert out.getvalue() == expected[name]
    finally:
        iso.close()
