"""What is to change in a clone's guest, decided from what was seen in its source's."""

import os
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.hypervisor.test_helper import Running, native
from undercroft.host.identity import (
    GuestFacts,
    _hold,
    parse,
    plan_steps,
    read_facts,
    write_facts,
)
from undercroft.hypervisor.helper import GuestHelper
from undercroft.model.base import Meta
from undercroft.model.vm import VM, VMSpec

SEEN = """hostname web1
boot 9b3a
interface eth0 52:54:00:9e:36:a8
interface lo 00:00:00:00:00:00
interface bad nonsense
file /etc/machine-id
file /etc/hostname
key /etc/ssh/ssh_host_ed25519_key
key /etc/ssh/ssh_host_rsa_key
key /somewhere/else
cloud /var/lib/cloud/instances/vm-1
systemd
hosts 127.0.0.1 localhost
hosts 127.0.1.1 web1 web1.local web10
helper /run/.undercroft-helper
"""


def vm(name: str = "web2") -> VM:
    return VM(meta=Meta(id="vm-2", name=name, created=0.0), spec=VMSpec(host="host"))


def test_what_the_guest_says_is_read() -> None:
    facts = parse(SEEN)
    assert facts is not None
    assert facts.hostname == "web1"
    assert facts.interfaces["52:54:00:9e:36:a8"] == "eth0"
    assert "nonsense" not in facts.interfaces
    assert facts.files == ("/etc/machine-id", "/etc/hostname")
    assert facts.keys == ("/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_rsa_key")
    assert facts.cloud == "/var/lib/cloud/instances/vm-1"
    assert facts.systemd


def test_without_a_helper_there_is_nothing_to_plan_with() -> None:
    assert parse(SEEN.replace("helper /run/.undercroft-helper\n", "")) is None


@given(st.text(max_size=300))
def test_nonsense_from_the_guest_does_no_harm(text: str) -> None:
    facts = parse(text + "\nhelper /run/.undercroft-helper\n")
    assert facts is not None
    plan_steps(vm(), facts, {"52:54:00:9e:36:a8": "52:54:00:00:00:01"}, {}, 1.0).batch.encode()


@pytest.mark.parametrize(
    "lie",
    [
        "cloud /",
        "cloud ..",
        "user root \u00b2 0 /root",
        f"user root {'9' * 5000} 0 /root",
        "\n".join(f"file /{n}" for n in range(9999)),
        "\n".join(f"key /etc/ssh/ssh_host_{n}_key" for n in range(9999)),
        f"key /etc/ssh/ssh_host_{'a' * 99999}_key",
        f"boot {'b' * 99999}",
        f"cloud /{'c' * 99999}",
        f"hostname a\nhosts {' a' * 3000}",
    ],
)
async def test_lies_of_the_guest_do_no_harm(lie: str) -> None:
    facts = parse(f"{lie}\nhelper /{'h' * 99999}\n")
    assert facts is not None
    other = vm("x" * 63)
    plan_steps(other, facts, {"52:54:00:9e:36:a8": "52:54:00:00:00:01"}, {}, 1.0).batch.encode()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(bytes(4096))  # more than it has to answer: all went well
        ours.setblocking(False)
        assert (await _hold(GuestHelper("x", ours), facts)).boot_id == 0


def test_facts_are_kept_and_forgotten(tmp_path: Path) -> None:
    facts = parse(SEEN)
    write_facts(tmp_path / "there", facts)
    assert read_facts(tmp_path / "there") == facts
    write_facts(tmp_path / "there", None)
    assert read_facts(tmp_path / "there") is None


def test_host_names_are_changed_as_words() -> None:
    steps = plan_steps(vm(), parse(SEEN) or GuestFacts(), {}, {}, 1.0)
    assert b"127.0.1.1 web2 web2.local web10\n" in steps.batch.encode()


def test_the_new_address_goes_to_the_interface_with_the_old_one() -> None:
    macs = {"52:54:00:9E:36:A8": "52:54:00:00:00:01", "52:54:00:00:00:77": "52:54:00:00:00:02"}
    encoded = plan_steps(vm(), parse(SEEN) or GuestFacts(), macs, {}, 1.0).batch.encode()
    assert struct.pack("<16sH6s", b"eth0", 1, bytes.fromhex("525400000001")) in encoded
    assert bytes.fromhex("525400000002") not in encoded


def test_keys_that_the_host_has_not_made_are_left_to_the_guest() -> None:
    keys = {"key_ed25519": "PRIVATE", "public_ed25519": "PUBLIC"}
    encoded = plan_steps(vm(), parse(SEEN) or GuestFacts(), {}, keys, 1.0).batch.encode()
    assert b"PRIVATE\n" in encoded
    assert b"/etc/ssh/ssh_host_rsa_key.pub\0" in encoded


@native
async def test_what_fails_in_the_guest_is_told(tmp_path: Path) -> None:
    written = tmp_path / "machine-id"
    written.write_text("old\n")
    running = Running(tmp_path)
    try:
        steps = plan_steps(vm(), GuestFacts(), {}, {}, 1.0)
        # Not the calls themselves, which would change this machine: what they may return.
        count = len(steps.batch.results(bytes(steps.batch.answer_size)))
        assert steps.shares([-1] * count) == (
            "random numbers (for a minute)",
            "hostname",
            "boot id",
        )
        files = plan_steps(vm(), GuestFacts(), {}, {}, 1.0)
        files.batch = type(files.batch)()
        files.put(os.fspath(written), "new\n", "machine-id")
        results = await running.run(files.batch)
        assert written.read_text() == "new\n"
        assert results[1] == 4
    finally:
        running.end()
