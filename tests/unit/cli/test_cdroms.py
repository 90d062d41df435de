"""CD-ROM drives and the discs in them."""

import pytest

from tests.unit.cli.fake_api import task, vm

DRIVES: list[dict[str, object]] = [
    {"bus": "sata", "medium": None, "unit": 0},
    {"bus": "scsi", "medium": "/b.iso", "unit": 2},
]


@pytest.fixture
def drives(api):
    api.routes["GET", "/v1/vms/web1"] = vm(cdroms=DRIVES)
    for unit in (0, 1, 2):
        for verb in ("insert", "eject"):
            api.routes["POST", f"/v1/vms/web1/cdroms/{unit}/{verb}"] = task(verb=f"cdrom.{verb}")
        api.routes["DELETE", f"/v1/vms/web1/cdroms/{unit}"] = task(verb="cdrom.remove")
    added = task(verb="cdrom.add", result={"drive": 1})
    api.routes["POST", "/v1/vms/web1/cdroms"] = added
    return api


def test_ls(croft, drives):
    done = croft("cdrom", "ls", "web1")
    assert done.out.splitlines()[1:] == ["0      sata  empty", "2      scsi  /b.iso"]
    assert croft("cdrom", "ls", "web1", "-q").out == "0\n2\n"
    drives.routes["GET", "/v1/vms/web1"] = vm(cdroms=[])
    assert "croft cdrom add web1" in croft("cdrom", "ls", "web1").err


def test_insert_takes_the_empty_drive(croft, drives, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = croft("cdrom", "insert", "web1", "a.iso")
    assert done.code == 0
    assert done.out.startswith("web1 has a.iso in drive 0")
    (call,) = drives.sent("POST", "/v1/vms/web1/cdroms/0/insert")
    assert call.json == {"path": str(tmp_path / "a.iso"), "force": False}


def test_eject_takes_the_full_one(croft, drives):
    assert croft("cdrom", "eject", "web1", "--force").code == 0
    assert drives.sent("POST", "/v1/vms/web1/cdroms/2/eject")[0].json == {"force": True}
    assert croft("cdrom", "eject", "web1", "--drive", "1").code == 0
    assert drives.sent("POST", "/v1/vms/web1/cdroms/1/eject")


def test_which_drive_has_to_be_said_where_it_could_be_several(croft, drives):
    both = [{**drive, "medium": "/a.iso"} for drive in DRIVES]
    drives.routes["GET", "/v1/vms/web1"] = vm(cdroms=both)
    for words in (["eject", "web1"], ["insert", "web1", "/a.iso"], ["rm", "web1"]):
        done = croft("cdrom", *words)
        assert done.code == 2
        assert "N of 0, 2" in done.err


def test_add_and_rm(croft, drives):
    done = croft("cdrom", "add", "web1", "/a.iso", "--bus", "scsi")
    assert done.out.startswith("web1 has CD-ROM drive 1")
    assert drives.sent("POST", "/v1/vms/web1/cdroms")[0].json == {"bus": "scsi", "path": "/a.iso"}
    assert croft("cdrom", "rm", "web1", "--drive", "2").code == 0
    assert drives.sent("DELETE", "/v1/vms/web1/cdroms/2")


def test_a_number_may_be_meant_as_a_drive(croft, drives):
    done = croft("cdrom", "rm", "web1", "3")
    assert done.code == 2
    assert "--drive 3" in done.err


def test_show(croft, drives):
    out = croft("show", "web1").out
    assert "drive 0 on sata: empty" in out
    assert "drive 2 on scsi: /b.iso" in out


def test_elsewhere_a_path_has_to_be_whole(croft, data):
    done = croft("--url", "https://example.org", "cdrom", "insert", "web1", "a.iso")
    assert done.code == 2
    assert "daemon's host" in done.err


def test_run_from_a_disc(croft, api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    api.routes["POST", "/v1/vms"] = task(verb="vm.create")
    api.routes["GET", "/v1/vms/vm-web1"] = vm(image=None)
    words = ["run", "--disk", "10G", "--cdrom", "a.iso", "--cdrom", "/x:y.iso:scsi"]
    assert croft(*words, "--boot", "cdrom").code == 0
    (call,) = api.sent("POST", "/v1/vms")
    assert call.json["boot"] == "cdrom"
    assert call.json["cdroms"] == [
        {"path": str(tmp_path / "a.iso")},
        {"path": "/x:y.iso", "bus": "scsi"},
    ]
    assert croft("run", "--cdrom", "a.iso").code == 0
