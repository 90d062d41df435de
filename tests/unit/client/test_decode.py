from __future__ import annotations

import msgspec
import pytest

from undercroft.client.decode import convert, decode
from undercroft.model.base import Meta
from undercroft.model.errors import UnsupportedError
from undercroft.model.image import Image, ImageContent, ImageFile, ImageSpec, ImageStatus
from undercroft.model.vm import VM, Exit, ExitReason, Forward, Port, VMSpec, VMStatus

WHOLE = VM(
    meta=Meta(id="vm-1", name="web1", created=1.5, labels={"a": "b"}),
    spec=VMSpec(host="h", ports=(Port(forwards=(Forward(guest_port=22),)),)),
    status=VMStatus(last_exit=Exit(reason=ExitReason.KILLED, time=1.0)),
)


def test_there_and_back() -> None:
    assert decode(msgspec.json.encode(WHOLE), VM) == WHOLE


def test_fields_of_a_newer_server_are_passed_over() -> None:
    newer = msgspec.json.decode(msgspec.json.encode(WHOLE))
    newer["new"] = 1
    newer["meta"]["new"] = {"x": 1}
    newer["spec"]["new"] = 2
    newer["spec"]["guest"]["new"] = 3
    newer["spec"]["ports"][0]["new"] = 4
    newer["spec"]["ports"][0]["forwards"][0]["new"] = 5
    newer["status"]["last_exit"]["new"] = 6
    assert decode(msgspec.json.encode(newer), VM) == WHOLE
    assert convert(newer, VM) == WHOLE


def test_within_dictionaries_too() -> None:
    image = Image(
        meta=Meta(id="img-1", name="tiny", created=1.0),
        spec=ImageSpec(source="build", value="tiny"),  # type: ignore[arg-type]
        status=ImageStatus(
            content=ImageContent(files={"disk": ImageFile(size=1, sha256="a")}, disk="disk")
        ),
    )
    newer = msgspec.json.decode(msgspec.json.encode(image))
    newer["spec"]["new"] = 1
    newer["status"]["content"]["files"]["disk"]["new"] = 1
    assert decode(msgspec.json.encode(newer), Image) == convert(newer, Image)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"meta": 3}', b'"x"', b"\xff"])
def test_what_cannot_be_understood(data: bytes) -> None:
    with pytest.raises(UnsupportedError, match="cannot be understood"):
        decode(data, VM)


def test_a_state_from_the_future() -> None:
    newer = msgspec.json.decode(msgspec.json.encode(WHOLE))
    newer["status"]["state"] = "levitating"
    with pytest.raises(UnsupportedError, match="levitating") as caught:
        decode(msgspec.json.encode(newer), VM)
    assert "newer" in (caught.value.action or "")
