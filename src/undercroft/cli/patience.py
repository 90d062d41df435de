"""Waiting for a guest that is still booting."""

from __future__ import annotations

import time

from undercroft.cli.errors import ours
from undercroft.cli.output import dig
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from undercroft.cli.context import Croft

PATIENCE = 90.0  # seconds after its start in which a guest may still be booting
_STEP = 0.3


def patiently(croft: Croft, name: str, call: Callable[[], Any], patience: float) -> Any:
    """What the call returns. It is repeated while the VM's guest agent is not there yet, for at
    most ``patience`` seconds, if the VM has one and was started only just now.

    Raises:
        UndercroftError: what the call raised last.
    """
    begun = time.monotonic()
    told = False
    while True:
        try:
            return call()
        except Exception as error:
            known = ours(error)
            waited = time.monotonic() - begun
            if known is None or known.code != "guest-agent" or waited > patience:
                raise
            if not told:
                if not _booting(croft, name, max(patience, PATIENCE)):
                    raise
                croft.note(f"waiting for the guest agent of {name} (it is booting) …")
                told = True
        time.sleep(_STEP)


def _booting(croft: Croft, name: str, patience: float) -> bool:
    """Whether an agent may be expected that is not there yet: within ``patience`` seconds of the
    VM's start."""
    vm = croft.api.get(f"/v1/vms/{quote(name)}")
    started = dig(vm, "status.instance.started")
    image = dig(vm, "spec.image")
    if dig(vm, "status.agent") or started is None or not image:
        return False
    if time.time() - started > patience:
        return False
    found = croft.api.get(f"/v1/images/{quote(image)}")
    return bool(dig(found, "status.content.agent", False))
