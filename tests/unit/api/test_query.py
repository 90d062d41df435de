from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undercroft.api.paths import parse_path
from undercroft.api.query import Query, parse_filter, run_query
from undercroft.model.base import Meta, Ref
from undercroft.model.errors import InvalidError, Problem
from undercroft.model.requests import Page
from undercroft.model.task import Task, TaskSpec, TaskStatus
from undercroft.model.vm import VM, Exit, ExitReason, Forward, Port, VMSpec, VMState, VMStatus
from undercroft.store.interface import Listing, Versioned


def vm(number: int, **changes: Any) -> VM:
    return VM(
        meta=Meta(
            id=f"vm-{number:016d}",
            name=changes.get("name", f"web{number}"),
            created=changes.get("created", float(number)),
            labels=changes.get("labels", {}),
        ),
        spec=VMSpec(
            host="host-1",
            cpus=changes.get("cpus", 1),
            memory=changes.get("memory", 512 << 20),
            ports=changes.get("ports", ()),
            tpm=changes.get("tpm", False),
        ),
        status=VMStatus(
            state=changes.get("state", VMState.STOPPED),
            addresses=changes.get("addresses", ()),
            agent=changes.get("agent"),
            last_exit=changes.get("last_exit"),
        ),
    )


def listing(vms: list[VM]) -> Listing[VM]:
    ordered = sorted(vms, key=lambda vm: vm.meta.id)
    return Listing([Versioned(vm, 1) for vm in ordered], 7)


def names(vms: list[VM], **query: Any) -> list[str]:
    return [item.meta.name for item in run_query(VM, listing(vms), Query(**query)).items]


FLEET = [
    vm(1, name="web1", cpus=2, memory=1 << 30, state=VMState.RUNNING, addresses=("10.0.0.1",)),
    vm(2, name="web2", cpus=4, labels={"env": "prod", "a.b/c": "x,y"}),
    vm(
        3,
        name="db",
        cpus=8,
        state=VMState.RUNNING,
        agent=True,
        labels={"env": "test"},
        ports=(Port(mac="52:54:00:00:00:01", forwards=(Forward(guest_port=22, host_port=2222),)),),
        last_exit=Exit(reason=ExitReason.KILLED, time=1.0, signal=9),
    ),
]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("status.state==running", ["web1", "db"]),
        ("status.state==running,meta.name~web*", ["web1"]),
        (" status.state == running , spec.cpus > 2 ", ["db"]),
        ("status.state!=running", ["web2"]),
        ("meta.name!~web*", ["db"]),
        ("meta.name~web?", ["web1", "web2"]),
        ("spec.cpus>=4", ["web2", "db"]),
        ("spec.cpus<4", ["web1"]),
        ("spec.memory>=1G", ["web1"]),
        ("spec.memory<1073741824", ["web2", "db"]),
        ("meta.labels.env==prod", ["web2"]),
        ('meta.labels.a.b/c=="x,y"', ["web2"]),
        ("meta.labels.env!=prod", ["web1", "db"]),
        ("meta.labels.env==null", ["web1"]),
        ("meta.labels.env!=null", ["web2", "db"]),
        ("status.addresses~10.*", ["web1"]),
        ("status.addresses==null", ["web2", "db"]),
        ("status.agent==true", ["db"]),
        ("status.agent==null", ["web1", "web2"]),
        ("spec.tpm==false", ["web1", "web2", "db"]),
        ("spec.ports.forwards.host_port==2222", ["db"]),
        ("status.last_exit.reason==killed", ["db"]),
        ("status.last_exit.signal>8", ["db"]),
        ("status.last_exit==null", ["web1", "web2"]),
        ('meta.name=="null"', []),
        ("meta.created>=2,meta.created<=2.5", ["web2"]),
        ("", ["web1", "web2", "db"]),
    ],
)
def test_filter(text: str, found: list[str]) -> None:
    assert names(FLEET, filter=text) == found


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("running", "'running'"),
        ("status.stat==running", "'stat'"),
        ("nonsense.x==1", "'nonsense'"),
        ("status.state==runing", "'runing'"),
        ("spec.cpus==many", "'many'"),
        ("spec.tpm==yes", "'yes'"),
        ("spec.tpm>true", "spec.tpm"),
        ("spec.cpus.x==1", "spec.cpus"),
        ('meta.name=="web', "quotation"),
        ('meta.name==we"b"', "quoted"),
        ("a==1," * 40, "32"),
        ("meta.name==" + "x" * 5000, "4096"),
        ("==x", "'==x'"),
        (",", "''"),
    ],
)
def test_what_makes_no_sense_is_named(text: str, named: str) -> None:
    with pytest.raises(InvalidError) as caught:
        names(FLEET, filter=text)
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"sort": "meta.nam"}, "'nam'"),
        ({"sort": "status.addresses"}, "status.addresses"),
        ({"sort": ","}, "''"),
        ({"fields": "meta.name,spec.cpu"}, "'cpu'"),
        ({"fields": ",".join(["meta.name"] * 100)}, "64"),
        ({"limit": 0}, "0"),
        ({"limit": 1001}, "1001"),
        ({"limit": -1}, "-1"),
        ({"cursor": "garbage"}, "cursor"),
        ({"cursor": ""}, "cursor"),
        ({"cursor": "é"}, "cursor"),
        ({"cursor": "x" * 10000}, "cursor"),
    ],
)
def test_other_nonsense_is_named_too(query: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidError) as caught:
        names(FLEET, **query)
    assert named in caught.value.message


def test_sort_puts_what_is_missing_last_either_way() -> None:
    assert names(FLEET, sort="meta.labels.env") == ["web2", "db", "web1"]
    assert names(FLEET, sort="-meta.labels.env") == ["db", "web2", "web1"]
    assert names(FLEET, sort="-status.state,spec.cpus") == ["web2", "web1", "db"]


def test_fields_keep_only_what_was_asked_for() -> None:
    page = run_query(
        VM,
        listing(FLEET[2:]),
        Query(fields="meta.name, status.state,spec.ports.forwards.host_port,meta.labels.env,spec"),
    )
    (item,) = msgspec.json.decode(msgspec.json.encode(page.items))
    assert item["meta"] == {"name": "db", "labels": {"env": "test"}}
    assert item["status"] == {"state": "running"}
    assert item["spec"]["memory"] == 512 << 20  # the whole of spec wins over its part
    lean = run_query(VM, listing(FLEET[2:]), Query(fields="spec.ports.forwards.host_port"))
    assert lean.items == [{"spec": {"ports": [{"forwards": [{"host_port": 2222}]}]}}]


def test_fields_of_what_is_not_there_are_null() -> None:
    page = run_query(VM, listing(FLEET[:1]), Query(fields="status.last_exit.reason"))
    assert page.items == [{"status": {"last_exit": None}}]


def test_paths_into_open_dicts() -> None:
    task = Task(
        meta=Meta(id="task-1", name="task-1", created=1.0),
        spec=TaskSpec(verb="vm.start", object=Ref(kind="vm", id="1", name="x"), host="h"),
        status=TaskStatus(
            result={"n": 3},
            error=Problem(title="t", status=1, code="busy", detail="d"),
        ),
    )
    assert parse_path(Task, "status.error.code").value(task) == "busy"
    assert parse_path(Task, "status.result.n").value(task) == 3
    test = parse_filter(Task, "status.result.n>=3")
    assert test is not None
    assert test(task)


def test_a_cursor_belongs_to_its_query() -> None:
    first = run_query(VM, listing(FLEET), Query(limit=1, sort="meta.name"))
    with pytest.raises(InvalidError, match="another"):
        run_query(VM, listing(FLEET), Query(limit=1, sort="-meta.name", cursor=first.next))
    with pytest.raises(InvalidError, match="another"):
        run_query(
            VM, listing(FLEET), Query(sort="meta.name", filter="spec.cpus>0", cursor=first.next)
        )


def pages(vms: list[VM], between: Any, **query: Any) -> list[VM]:
    """All items, page by page, with something happening between the pages."""
    found: list[VM] = []
    cursor = None
    for turn in range(1000):
        page: Page = run_query(VM, listing(vms), Query(cursor=cursor, **query))
        found += page.items
        if page.next is None:
            return found
        cursor = page.next
        between(turn, found)
    raise AssertionError("the pages do not end")


orders = st.sampled_from(
    [None, "meta.name", "-meta.name", "spec.cpus", "-spec.cpus,meta.labels.x", "-meta.created"]
)
fleets = st.lists(
    st.builds(
        vm,
        st.integers(0, 10**6),
        name=st.sampled_from(["a", "b", "c", "d"]),
        cpus=st.integers(1, 3),
        created=st.floats(0, 1e9),
        labels=st.dictionaries(st.just("x"), st.text(max_size=3), max_size=1),
    ),
    max_size=25,
    unique_by=lambda vm: vm.meta.id,
)


@given(fleets, orders, st.integers(1, 7))
def test_pages_are_the_whole(vms: list[VM], sort: str | None, limit: int) -> None:
    whole = run_query(VM, listing(vms), Query(sort=sort, limit=1000)).items
    assert pages(vms, lambda *_: None, sort=sort, limit=limit) == whole
    assert sorted(vm.meta.id for vm in whole) == sorted(vm.meta.id for vm in vms)


@given(fleets, fleets, orders, st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_pages_survive_what_others_do_meanwhile(
    vms: list[VM], others: list[VM], sort: str | None, limit: int, random: Any
) -> None:
    known = {vm.meta.id for vm in vms}
    others = [vm for vm in others if vm.meta.id not in known]
    fleet, removed = list(vms), set[str]()

    def between(turn: int, found: list[VM]) -> None:
        if fleet and random.random() < 0.5:  # also the very one that the cursor stands on
            gone = found[-1] if random.random() < 0.5 and found[-1] in fleet else fleet[0]
            fleet.remove(gone)
            removed.add(gone.meta.id)
        if others:
            fleet.append(others.pop())

    found = [vm.meta.id for vm in pages(fleet, between, sort=sort, limit=limit)]
    assert len(found) == len(set(found)), "an item came twice"
    missing = known - removed - set(found)
    assert not missing, "an item that was there all the time was left out"


@given(st.text(max_size=60))
def test_no_text_gets_beyond_an_invalid_error(text: str) -> None:
    for query in (
        Query(filter=text),
        Query(sort=text),
        Query(fields=text),
        Query(cursor=text),
        Query(filter=f"meta.name~{text}"),
        Query(filter=f"spec.cpus>={text}"),
    ):
        with contextlib.suppress(InvalidError):
            msgspec.json.encode(run_query(VM, listing(FLEET), query))


@given(st.binary(max_size=80))
def test_no_cursor_gets_beyond_an_invalid_error(data: bytes) -> None:
    import base64

    good = run_query(VM, listing(FLEET), Query(limit=1, sort="spec.cpus")).next
    assert good is not None
    raw = base64.urlsafe_b64decode(good + "==")
    digest = msgspec.json.decode(raw)[0]
    for text in (
        base64.urlsafe_b64encode(data).decode(),
        base64.urlsafe_b64encode(msgspec.json.encode([digest, [data.hex()], "x"])).decode(),
        base64.urlsafe_b64encode(msgspec.json.encode([digest, [], "x"])).decode(),
        base64.urlsafe_b64encode(msgspec.json.encode([digest, [None], "x"])).decode(),
    ):
        with contextlib.suppress(InvalidError):
            run_query(VM, listing(FLEET), Query(sort="spec.cpus", cursor=text))


def test_a_hostile_pattern_takes_no_time() -> None:
    fleet = [vm(number, name="a" * 60) for number in range(50)]
    assert names(fleet, filter="meta.name~" + "*a" * 40 + "b") == []
