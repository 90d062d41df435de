"""``croft backup``: what it says."""

import time
from typing import Any

import pytest

from tests.unit.cli.fake_api import task


def done(verb: str, arguments: dict[str, object], **status: Any) -> dict[str, object]:
    made = task(verb=verb, name="d1", **status)
    made["spec"]["arguments"] = arguments
    return made


def backup(id: str) -> dict[str, object]:
    sizes = {"disks": [], "changed": 0, "written": 0}
    return {"id": id, "name": "d1", "kind": "full", "created": time.time() - 7200, **sizes}


def test_restoring_over_a_vm_tells_from_when_and_that_it_is_off(croft, api):
    moment = time.mktime((2026, 11, 27, 17, 14, 0, 0, 0, -1))
    arguments = {"backup": "bk-1", "moment": moment, "off": True}
    api.routes["POST", "/v1/backups/restore"] = done("backup.restore", arguments)
    words = ("backup", "restore", "d1", "--from", "/b")
    out = croft(*words, "--over", "d1", "--force").out
    told = "d1 is as it was in bk-1 (2026-11-27 17:14:00)"
    assert out.startswith(f"{told}, switched off: croft start d1 ")
    api.routes["POST", "/v1/backups/restore"] = done("backup.restore", {**arguments, "off": False})
    assert croft(*words, "--over", "d1", "--force").out.startswith(f"{told}  ")
    assert croft(*words).out.startswith("d1 is restored from bk-1 (2026-11-27 17:14:00)  ")


def test_what_is_a_file_is_no_backup(croft, data, tmp_path):
    file = tmp_path / "x.backup"
    for given, hint in (
        (str(file), f"croft backup restore - < {file}"),
        (str(tmp_path), f"--from {tmp_path}"),
    ):
        wrong = croft("backup", "restore", given)
        assert wrong.code == 2
        assert hint in wrong.err


@pytest.mark.parametrize("words", [["/b"], ["--from", "/b"]])
def test_ls_takes_the_directory_either_way(croft, api, words):
    api.routes["GET", "/v1/backups"] = {"backups": [backup("bk-1")]}
    assert "bk-1" in croft("backup", "ls", *words).out
    assert api.sent("GET", "/v1/backups")[0].query == {"repository": "/b"}
    assert croft("backup", "ls", "/b", "--from", "/c").code == 2


def test_rm_and_prune_name_what_goes(croft, api):
    result = {"removed": ["bk-1"], "freed": 1 << 20}
    api.routes["DELETE", "/v1/backups/bk-1"] = done("backup.remove", {}, result=result)
    said = croft("backup", "rm", "bk-1", "--from", "/b").out
    assert said.startswith("d1 no longer has bk-1; 1M were freed")
    api.routes["GET", "/v1/backups"] = {"backups": [backup("bk-1"), backup("bk-2")]}
    api.routes["POST", "/v1/backups/prune"] = {"backups": ["bk-1"]}
    said = croft("backup", "prune", "--keep", "1", "-n", "--from", "/b").out
    assert said.splitlines() == ["bk-1 (d1, 2h old) would be removed"]
    api.routes["POST", "/v1/backups/prune"] = {"backups": []}
    done_ = croft("backup", "prune", "--keep", "9", "-n", "--from", "/b")
    assert (done_.out, done_.err) == ("", "all of them are kept\n")
