"""What is said of a VM that goes to another platform."""

import msgspec

from undercroft.host.exporting import boots_elsewhere
from undercroft.model.base import Meta
from undercroft.model.image import (
    Image,
    ImageContent,
    ImageSourceKind,
    ImageSpec,
    ImageState,
    ImageStatus,
)
from undercroft.model.vm import Firmware, Machine, VMSpec

SHAPE = VMSpec(host="host-0000000000000000", firmware=Firmware.KERNEL)


def image(name: str, disk: str | None = None) -> Image:
    return Image(
        meta=Meta(id="img-0000000000000000", name=name, created=1.0),
        spec=ImageSpec(source=ImageSourceKind.BUILD, value=name),
        status=ImageStatus(
            state=ImageState.READY, content=ImageContent(kernel="kernel", disk=disk)
        ),
    )


def test_a_disk_with_a_boot_loader_boots_by_firmware() -> None:
    debian = image("debian:12", disk="disk.qcow2")
    firmware, note = boots_elsewhere(SHAPE, debian)
    assert firmware is Firmware.BIOS
    assert "elsewhere it boots by its own boot loader (BIOS)" in note
    virt = msgspec.structs.replace(SHAPE, machine=Machine.VIRT)
    assert boots_elsewhere(virt, debian)[0] is Firmware.UEFI


def test_one_without_does_not_boot() -> None:
    firmware, note = boots_elsewhere(SHAPE, image("tiny"))
    assert firmware is Firmware.KERNEL
    assert "it will not boot elsewhere" in note


def test_of_an_image_that_is_gone_nothing_is_claimed() -> None:
    assert boots_elsewhere(SHAPE, None)[0] is Firmware.KERNEL
    assert "will not" not in boots_elsewhere(SHAPE, None)[1]
