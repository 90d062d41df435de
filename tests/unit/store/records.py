"""Records to write down."""

from undercroft.model.base import Meta, Ref
from undercroft.model.event import Event
from undercroft.model.names import new_id
from undercroft.model.vm import VM, Disk, Guest, Port, VMSpec
from undercroft.model.volume import Volume, VolumeSpec

HOST = "host-0000000000000000"


def vm(name: str = "web1", id: str | None = None, cpus: int = 1, user_data: str = "") -> VM:
    """A VM with something in every corner."""
    return VM(
        meta=Meta(id=id or new_id("vm"), name=name, created=1.5, labels={"tier": "wéb 🕸"}),
        spec=VMSpec(
            host=HOST,
            cpus=cpus,
            disks=(Disk(volume="vol-0000000000000000"),),
            ports=(Port(mac="52:54:00:00:00:01"),),
            guest=Guest(user_data=user_data or None),
        ),
    )


def volume(name: str = "web1", id: str | None = None, size: int = 1 << 20) -> Volume:
    """A volume."""
    return Volume(
        meta=Meta(id=id or new_id("volume"), name=name, created=2.5),
        spec=VolumeSpec(size=size, host=HOST),
    )


def event(message: str, id: str | None = None, data: object = None) -> Event:
    """An event about nothing that exists."""
    return Event(
        meta=Meta(id=id or new_id("event"), name="event", created=3.5),
        type="vm.started",
        object=Ref(kind="vm", id="vm-0000000000000000", name="web1"),
        message=message,
        data={} if data is None else {"value": data},
    )
