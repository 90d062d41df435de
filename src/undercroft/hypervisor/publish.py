"""Ports of the host that lead into a guest, changed while it runs (user-mode networks)."""

from __future__ import annotations

from undercroft.hypervisor.devices.network import forward_rule
from undercroft.hypervisor.plan import PlanPort
from undercroft.hypervisor.qmp import Monitor
from undercroft.model.errors import QmpError

__all__ = ["publish"]


async def publish(
    monitor: Monitor, before: tuple[PlanPort, ...], after: tuple[PlanPort, ...]
) -> None:
    """Makes the forwarded ports those of ``after``. May be repeated.

    Raises:
        QmpError, TimeLimitError: a port of the host cannot be had, or QEMU ended.
    """
    for index, port in enumerate(before):
        for forward in port.forwards:
            outside = forward_rule(forward).partition("-")[0]
            await _say(monitor, f"hostfwd_remove net{index} {outside}")
    for index, port in enumerate(after):
        for forward in port.forwards:
            rule = forward_rule(forward)
            if answer := await _say(monitor, f"hostfwd_add net{index} {rule}"):
                raise QmpError(
                    f"{monitor.name} cannot have {rule.partition('-')[0]} of the host: {answer}",
                    action="choose another host port: this one is taken, or not allowed",
                )


async def _say(monitor: Monitor, line: str) -> str:
    # QMP has no command for this (QEMU 10.1).
    answer = await monitor.execute("human-monitor-command", {"command-line": line})
    return str(answer).strip()
