"""What a quick command may import."""

import json
import subprocess
import sys

import pytest

# Each costs more than the whole of `croft ls` may.
HEAVY = {
    "asyncio",
    "dataclasses",
    "http",
    "inspect",
    "msgspec",
    "rich",
    "ssl",
    "subprocess",
    "tempfile",
    "typing",
    "urllib",
    "uuid",
    "websockets",
}

PROGRAM = """
import json, sys
from undercroft.cli.main import main
before = set(sys.modules)
code = main(sys.argv[1:])
print(json.dumps([code, sorted({name.split(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["ls"],
        ["ls", "-q"],
        ["show", "web1"],
        ["start", "web1"],
        ["stop", "web1"],
        ["__complete", "start", ""],
    ],
)
def test_quick_commands_stay_light(api, words):
    from tests.unit.cli.fake_api import page, task, vm

    api.routes["GET", "/v1/vms"] = page(vm())
    api.routes["GET", "/v1/vms/web1"] = vm()
    api.routes["GET", "/v1/images/img-1"] = {"meta": {"name": "tiny"}}
    api.routes["POST", "/v1/vms/web1/start"] = task()
    api.routes["POST", "/v1/vms/web1/stop"] = task(verb="vm.stop")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    # Whatever Python itself or a .pth file of the environment has brought is not ours.
    bare = subprocess.run(
        [sys.executable, "-c", "import json, sys; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not (HEAVY & set(modules)) - set(json.loads(bare.stdout))
