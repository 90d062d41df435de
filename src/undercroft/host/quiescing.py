"""Having a guest bring its file systems in order and leave them alone for a moment; and never for
longer, whatever becomes of its agent, of the snapshot, or of the daemon."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from undercroft.host.actor import VMActor
from undercroft.hypervisor.machine import QemuMachine, RunState
from undercroft.model.errors import GuestAgentError, TimeLimitError, UndercroftError

__all__ = ["quiescent", "thaw_at_last"]

log = structlog.get_logger(__name__)

PATIENCE = 5.0  # seconds for a guest to thaw before it is left to itself
RETRY_INTERVAL = 5.0  # seconds between two tries to thaw a guest that does not answer


@contextlib.asynccontextmanager
async def quiescent(actor: VMActor, machine: QemuMachine | None) -> AsyncIterator[None]:
    """Has the guest freeze its file systems inside the block (None: does nothing).

    Raises:
        GuestAgentError, TimeLimitError: its agent does not.
    """
    if machine is None:
        yield
        return
    agent = machine.agent
    if agent is None or machine.run_state is not RunState.RUNNING:
        raise GuestAgentError(
            f"no guest agent can bring the file systems of vm {machine.name} in order",
            object=f"vm {machine.name}",
            action="leave --quiesce out, or start the guest agent in the guest",
        )
    try:
        with contextlib.suppress(GuestAgentError):  # it may be frozen since an earlier daemon
            if await agent.frozen():
                await agent.thaw()
        await agent.freeze()
        yield
    finally:
        thawing = thaw_at_last(actor, machine)
        if thawing is not None:
            await asyncio.wait({thawing}, timeout=PATIENCE)


def thaw_at_last(actor: VMActor, machine: QemuMachine) -> asyncio.Task[None] | None:
    """Has the guest thaw, again and again until it says that it has, beside everything else. Should
    the daemon end before that, the next one sees to it when the agent answers."""
    if machine.agent is None:
        return None
    return actor.in_background(_thaw(machine))


async def _thaw(machine: QemuMachine) -> None:
    agent = machine.agent
    while agent is not None and machine.run_state is not RunState.ENDED:
        try:
            await agent.thaw()
        except TimeLimitError as error:
            log.warning("a guest does not thaw yet", vm=machine.name, error=error.message)
        except UndercroftError as error:
            # Without an agent, or with one that knows nothing of this, there is nothing to thaw;
            # one that comes back is asked by who watches it.
            log.warning("a guest was not thawed", vm=machine.name, error=error.message)
            return
        else:
            return
        await asyncio.sleep(RETRY_INTERVAL)
