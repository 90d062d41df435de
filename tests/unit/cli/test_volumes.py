"""``croft volume``: what it says."""

from tests.unit.cli.fake_api import page, task, vm


def volume(name: str, **spec: object) -> dict[str, object]:
    return {
        "meta": {"id": f"vol-{name}", "name": name, "created": 1e9},
        "spec": {"size": 1 << 30, **spec},
        "status": {"state": "ready"},
    }


def missing(kind: str, name: str) -> tuple[int, dict[str, object]]:
    detail = {"detail": f"there is no {kind} {name}", "object": f"{kind} {name}"}
    said = {"type": "urn:undercroft:error:not-found", "title": "Not found", "status": 404}
    return 404, {**said, "code": "not-found", **detail}


def test_ls_tells_what_is_encrypted(croft, api):
    for noun in ("vms", "datastores"):
        api.routes["GET", f"/v1/{noun}"] = page()
    api.routes["GET", "/v1/volumes"] = page(volume("open"), volume("safe", encrypted=True))
    head, plain, safe = croft("volume", "ls").out.splitlines()
    assert "ENCRYPTED" in head
    assert ("yes" in plain, "yes" in safe) == (False, True)


def test_a_vm_in_the_place_of_a_volume(croft, api):
    api.routes["GET", "/v1/vms/web1"] = vm(disks=[{"volume": "vol-root"}])
    api.routes["GET", "/v1/volumes/data1"] = volume("data1")
    api.routes["GET", "/v1/volumes"] = page(volume("data1"), volume("root"))
    for verb in ("attach", "detach"):
        api.routes["POST", f"/v1/volumes/web1/{verb}"] = missing("volume", "web1")
    said = croft("volume", "attach", "web1", "data1").err
    assert "the order is VOLUME VM: croft volume attach data1 web1" in said
    assert "name a volume of it: root\n" in croft("volume", "detach", "web1").err


def test_a_volume_that_is_misspelt(croft, api):
    api.routes["GET", "/v1/volumes"] = page(volume("data1"))
    api.routes["POST", "/v1/volumes/dta1/detach"] = missing("volume", "dta1")
    assert "did you mean data1" in croft("volume", "detach", "dta1").err


def test_limits_are_told_with_their_burst(croft, api):
    set_ = task(verb="volume.limit", name="data1")
    set_["spec"]["object"]["kind"] = "volume"
    api.routes["PATCH", "/v1/volumes/data1"] = set_
    limits = {"iops": 100, "burst": 30}
    api.routes["GET", "/v1/volumes/data1"] = volume("data1", limits=limits)
    told = "100 operations per second (ten times as much for 30 s)"
    said = croft("volume", "set", "data1", "--iops", "100", "--burst", "30").out
    assert said.startswith(f"data1 has new limits: {told}")
    said = croft("volume", "set", "data1", "--iops", "lots").err
    assert "--iops is a whole number, not 'lots'" in said


def test_usage_of_none(croft, api):
    api.routes["GET", "/v1/volumes"] = page()
    api.routes["GET", "/v1/layers"] = {"nodes": []}
    done = croft("volume", "usage")
    assert (done.out, done.code) == ("", 0)
    assert "no volumes yet" in done.err


def test_the_tree_names_the_vm_of_a_snapshot(croft, api):
    kept = [{"kind": "snapshot", "id": "snap-1", "name": "s1", "of": "d1"}]
    node = {"id": "layer-1", "kind": "layer", "size": 1 << 30, "kept": kept}
    api.routes["GET", "/v1/layers"] = {"nodes": [node]}
    assert "snapshot s1 of d1" in croft("volume", "tree").out
