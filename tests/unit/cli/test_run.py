"""From an image's name to a VM."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.fake_api import FakeApi, page, task, vm
from undercroft.cli.errors import UsageError
from undercroft.cli.keys import read_key
from undercroft.cli.ports import parse_forwards

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB6Aq0bLzc me@here"
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB6Aq0bLzd me@there"


def image(name: str = "debian:12", state: str = "ready", **content: object) -> dict[str, object]:
    return {
        "meta": {"id": "img-1", "name": name},
        "spec": {"source": "build"},
        "status": {"state": state, "content": {"ssh": True, "agent": True, **content}},
        "tasks": ["task-9"] if state == "pending" else [],
    }


@pytest.fixture
def ready(api):
    """A daemon with an image that makes VMs at once."""
    api.routes["GET", "/v1/images/debian:12"] = image(cloud_init=True)
    api.routes["POST", "/v1/vms"] = task(verb="vm.create")
    ports = [{"mode": "user", "forwards": [{"host_port": 20022, "guest_port": 22}]}]
    api.routes["GET", "/v1/vms/vm-web1"] = vm(ports=ports, guest={"user": "debian"})
    return api


def sent(api: FakeApi) -> Any:
    return api.sent("POST", "/v1/vms")[0].json


def test_it_tells_how_to_get_in(croft, ready):
    done = croft("run", "debian:12", "--no-ssh-key")
    assert done.code == 0
    assert done.out.startswith("web1 is running (2 CPUs, 1G, debian:12)")
    for text in (
        "croft console web1",
        "croft shell web1",
        "ssh -p 20022 debian@127.0.0.1",
        "croft exec web1",
    ):
        assert text in done.out


def test_the_request(croft, ready):
    words = "--name w --cpus 2 --memory 1G --disk 10G --firmware uefi --secure-boot --tpm "
    words += "--publish 8080:80 --label a=b --restart always --network restricted --hostname h "
    words += "--user me --no-ssh-key --accelerator tcg --display none --no-start"
    assert croft("run", "debian:12", *words.split()).code == 0
    assert sent(ready) == {
        "name": "w",
        "image": "img-1",
        "cpus": 2,
        "memory": 1 << 30,
        "disk": 10 << 30,
        "firmware": "uefi",
        "secure_boot": True,
        "tpm": True,
        "forwards": [{"guest_port": 80, "host_port": 8080}],
        "labels": {"a": "b"},
        "restart": "always",
        "ports": [{"mode": "restricted"}],
        "guest": {"hostname": "h", "user": "me"},
        "accelerator": "tcg",
        "display": "none",
        "start": False,
    }


def test_what_is_not_said_is_left_to_the_image(croft, ready):
    croft("run", "debian:12", "--no-ssh-key")
    assert sent(ready) == {"image": "img-1", "guest": {}, "start": True}


def test_without_network(croft, ready):
    croft("run", "debian:12", "--no-ssh-key", "--network", "none")
    assert sent(ready)["ports"] == []


def test_ones_own_keys_are_given_to_a_guest_with_cloud_init(croft, ready, tmp_path: Path):
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519.pub").write_text(KEY + "\n")
    croft("run", "debian:12")
    assert sent(ready)["guest"] == {"ssh_keys": [KEY]}


def test_a_guest_without_cloud_init_gets_none(croft, ready):
    ready.routes["GET", "/v1/images/debian:12"] = image(cloud_init=False)
    croft("run", "debian:12")
    assert sent(ready)["guest"] == {}


def test_files_of_the_user(croft, ready, tmp_path: Path):
    (tmp_path / "key.pub").write_text(KEY)
    (tmp_path / "data.yaml").write_text("#cloud-config\n")
    croft(
        "run",
        "debian:12",
        "--ssh-key",
        f"{tmp_path}/key.pub",
        "--user-data",
        f"{tmp_path}/data.yaml",
    )
    assert sent(ready)["guest"] == {"ssh_keys": [KEY], "user_data": "#cloud-config\n"}
    done = croft("run", "debian:12", "--user-data", f"{tmp_path}/nope")
    assert done.code == 1
    assert "no such file" in done.err


def test_an_image_that_is_not_there_is_built_first(croft, ready):
    found = iter([None, image("tiny")])
    ready.routes["GET", "/v1/images/tiny"] = lambda call: next(found)
    ready.routes["POST", "/v1/images"] = task("task-2", verb="image.create", name="tiny")
    done = croft("run", "tiny")
    assert done.code == 0
    assert "building image tiny" in done.err
    assert ready.sent("POST", "/v1/images")[0].json["source"] == "build"


def test_an_image_of_the_catalogue_is_fetched(croft, ready):
    found = iter([None, image("fedora:42")])
    ready.routes["GET", "/v1/images/fedora:42"] = lambda call: next(found)
    ready.routes["GET", "/v1/catalogue"] = page({"name": "fedora:42"})
    ready.routes["POST", "/v1/images"] = task("task-2", verb="image.create", name="fedora:42")
    assert croft("run", "fedora:42").code == 0
    request = ready.sent("POST", "/v1/images")[0].json
    assert (request["source"], request["value"]) == ("catalogue", "fedora:42")


def test_an_image_that_somebody_else_is_making_is_waited_for(croft, ready):
    states = iter(["pending", "ready"])
    ready.routes["GET", "/v1/images/tiny"] = lambda call: image("tiny", next(states))
    ready.routes["GET", "/v1/tasks/task-9"] = task("task-9", verb="image.create", name="tiny")
    assert croft("run", "tiny").code == 0
    assert not ready.sent("POST", "/v1/images")


def test_an_image_that_failed_is_made_anew(croft, ready):
    states = iter(["failed", "ready"])
    ready.routes["GET", "/v1/images/tiny"] = lambda call: image("tiny", next(states))
    ready.routes["POST", "/v1/images"] = task("task-2", verb="image.create", name="tiny")
    assert croft("run", "tiny").code == 0
    assert ready.sent("POST", "/v1/images")[0].json["replace"] is True


def test_an_unknown_image(croft, ready):
    ready.routes["GET", "/v1/catalogue"] = page({"name": "fedora:42"})
    done = croft("run", "debian:21")
    assert done.code == 3
    assert "did you mean debian:12" in done.err


def test_a_file_is_no_image_yet(croft, ready, tmp_path: Path):
    ready.routes["GET", "/v1/catalogue"] = page()
    (tmp_path / "d.qcow2").touch()
    done = croft("run", f"{tmp_path}/d.qcow2")
    assert done.code == 3
    assert "croft image import" in done.err


def test_a_template_is_no_image(croft, ready):
    ready.routes["GET", "/v1/catalogue"] = page()
    ready.routes["GET", "/v1/templates"] = page({"meta": {"name": "tw"}})
    done = croft("run", "tw")
    assert done.code == 3
    assert "there is no image tw, but a template" in done.err
    assert "croft clone tw NAME --start" in done.err


def test_json_and_detach(croft, ready):
    done = croft("run", "debian:12", "--no-ssh-key", "--json")
    assert json.loads(done.out)["meta"]["name"] == "web1"
    assert croft("run", "debian:12", "--no-ssh-key", "--detach").out == "web1\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", {"guest_port": 80}),
        ("8080:80", {"host_port": 8080, "guest_port": 80}),
        ("0.0.0.0:53:5353/udp", {
            "host_address": "0.0.0.0", "host_port": 53, "guest_port": 5353, "protocol": "udp"
        }),
    ],
)  # fmt: skip
def test_ports(text, expected):
    assert parse_forwards([text]) == [expected]


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "80:", "0", "8080:0", "99999:1", "1:2/sctp"])
def test_no_ports(text):
    with pytest.raises(UsageError):
        parse_forwards([text])


def test_keys(tmp_path: Path):
    assert read_key(KEY) == [KEY]
    both = tmp_path / "both"
    both.write_text(f"# mine\n{KEY}\n\n{OTHER}\n")
    assert read_key(str(both)) == [KEY, OTHER]
    private = tmp_path / "id"
    private.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nx\n")
    with pytest.raises(UsageError, match="private key"):
        read_key(str(private))
    (tmp_path / "id.pub").write_text(KEY)
    assert read_key(str(private)) == [KEY]
    (tmp_path / "none").write_text("hello")
    with pytest.raises(UsageError, match="no SSH public key"):
        read_key(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="no such file"):
        read_key(str(tmp_path / "nowhere"))
