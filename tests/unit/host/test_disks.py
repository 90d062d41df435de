"""What a QEMU that has ended did not do does not matter; what one refuses does."""

from __future__ import annotations

from typing import cast

import pytest

from undercroft.host.actor import VMActor
from undercroft.host.disks import unless_it_ended
from undercroft.hypervisor.machine import ExitReport
from undercroft.model.base import Meta
from undercroft.model.errors import QmpError, UndercroftError, WrongStateError
from undercroft.model.vm import VM, VMSpec

VM1 = VM(meta=Meta(id="vm-1", name="web1", created=1.0), spec=VMSpec(host="host-1"))


class Actor:
    """Knows only whether its machine has ended."""

    def __init__(self, ended: bool) -> None:
        self.report = ExitReport(hint="signal", time=1.0) if ended else None

    async def exited(self, timeout: float | None) -> ExitReport | None:
        return self.report


@pytest.mark.parametrize(
    ("error", "ended", "matters"),
    [
        (QmpError("the monitor went away"), True, False),
        (WrongStateError("vm web1 is ended, not running"), True, False),
        (QmpError("the monitor went away"), False, True),
        (WrongStateError("vm web1 is shutdown, not running"), False, True),
        (QmpError("QEMU refused", qmp_class="GenericError"), True, True),
    ],
)
async def test_what_matters(error: UndercroftError, ended: bool, matters: bool) -> None:
    actor = cast(VMActor, Actor(ended))
    if not matters:
        async with unless_it_ended(actor, VM1):
            raise error
        return
    with pytest.raises(type(error)):
        async with unless_it_ended(actor, VM1):
            raise error
