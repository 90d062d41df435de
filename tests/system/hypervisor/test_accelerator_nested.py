"""The accelerator probe on a host whose KVM really works."""

import shutil
from pathlib import Path

import pytest

from tests.system.hypervisor.nested_host import run_on_kvm_host
from undercroft.hypervisor.accelerator_guest import STAGES

TASK = """
import asyncio
import os
from pathlib import Path

import msgspec

from undercroft.hypervisor.accelerator import probe
from undercroft.hypervisor.emulator import find_emulator


async def main():
    there = os.path.exists("/task.py")  # or still on the host that prepares it all
    device = Path("/dev/kvm" if there else "/nowhere")
    return await probe(await find_emulator("x86_64"), Path("/dev/null"), device=device)


print("report: " + msgspec.json.encode(asyncio.run(main())).decode())
"""


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_real_kvm_is_accepted(tmp_path: Path) -> None:
    found = run_on_kvm_host(TASK, tmp_path)
    assert found["kvm"]["available"], found
    assert found["kvm"]["code"] == "works"
    assert found["kvm"]["stages"] == "".join(STAGES)
    assert found["tcg"]["available"], found
