"""Instant clones of tiny and debian:12, and warm starts, against cold boots of the same image."""

from __future__ import annotations

import contextlib
from pathlib import Path

from bench.figures import Figure, Section, Series, Unit, alternate
from bench.guests import SOURCE, TEMPLATE, Guests
from bench.installation import installation

_INSTANT = 0.250  # seconds
_TIMES = 30  # faster than the cold boot of debian:12
_SHAPE = ("--memory", "256M", "--network", "restricted")
_DEBIAN = ("--network", "restricted")
_WARMING = 1200.0  # seconds until a warm template of debian:12 is there, under emulation
_METHOD = (
    "From executing the command until the guest's agent has answered, asked for its name, with the "
    "new one; each VM goes before the next comes. The clones are of a template with memory, for "
    "which the daemon holds VMs ready (their QEMU has started and loaded the state), or does not. "
)


def tiny(directory: Path, runs: int) -> list[Section]:
    """Clones of a tiny VM with 256 MB."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(installation(directory / "clones"))
        ours.start_daemon()
        ours.image()
        guests = Guests(ours, stack.enter_context(ours.client), "tiny", _SHAPE)
        guests.source()
        found = alternate(runs, {"clone": guests.clone, "boot": guests.boot})
        found |= alternate(runs, {"running": guests.of_running})
        guests.client.close()
        ours.stop_daemon()
        ours.start_daemon(warm="on")
        guests.client = stack.enter_context(ours.client)
        guests.clone()  # from now on some are held
        found |= alternate(runs, {"held": guests.held})
        ours.croft("rm", "--force", SOURCE)
    boot = found["boot"]
    figures = [
        _instant("instant clone, VMs held ready", found["held"], boot),
        _instant("instant clone, none held ready", found["clone"], boot),
        Figure("of that, processor time of QEMU", "", *_cpu(guests, "clone", runs)),
        Figure(
            "instant clone of a running VM, which is frozen first",
            "",
            found["running"],
            Unit.SECONDS,
            None,
            boot,
        ),
    ]
    return [
        Section(
            "clones",
            "Instant clones of a tiny VM with 256 MB",
            _METHOD,
            figures,
            "its cold boot",
            [_inside(guests, runs)],
        )
    ]


def _instant(what: str, ours: Series, boot: Series) -> Figure:
    must = f"≤ {_INSTANT * 1000:.0f} ms"
    return Figure(what, must, ours, Unit.SECONDS, ours.median <= _INSTANT, boot)


def _cpu(guests: Guests, kind: str, runs: int) -> tuple[Series, Unit, None, Series]:
    used = {name: Series(tuple(values[-runs:])) for name, values in guests.cpu.items()}
    return used[kind], Unit.SECONDS, None, used["boot"]


def _inside(guests: Guests, runs: int) -> str:
    def spent(kind: str) -> str:
        return Unit.SECONDS.text(Series(tuple(guests.tasks[kind][-runs:])).median)

    return (
        f"Of that, from the daemon's writing down of the request until the agent had answered it: "
        f"{spent('held')} with VMs held ready, {spent('clone')} without. The rest is the process "
        "of `croft`."
    )


def debian(directory: Path, runs: int) -> list[Section]:
    """Clones and warm starts of debian:12, whose image is built if need be."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(installation(directory / "debian"))
        ours.start_daemon()
        ours.image("debian:12")
        guests = Guests(ours, stack.enter_context(ours.client), "debian:12", _DEBIAN)
        boots = [guests.source()]
        found = alternate(runs, {"clone": guests.clone})
        guests.client.close()
        ours.stop_daemon()
        ours.start_daemon(warm="on")
        guests.client = stack.enter_context(ours.client)
        guests.clone()
        found |= alternate(runs, {"held": guests.held})
        ours.croft("rm", "--force", SOURCE)
        ours.croft("template", "rm", TEMPLATE)
        boots.append(guests.first_run(_WARMING))
        guests.run(held=False)
        found |= alternate(runs, {"warm": guests.run}, warm_up=0)
    boot = Series(tuple(boots))

    def figure(what: str, ours: Series) -> Figure:
        reached = boot.median >= _TIMES * ours.median
        return Figure(what, f"{_TIMES} times faster", ours, Unit.SECONDS, reached, boot)

    figures = [
        figure("instant clone, VMs held ready", found["held"]),
        figure("instant clone, none held ready", found["clone"]),
        figure("`croft run debian:12`, once its image was booted before", found["warm"]),
    ]
    times = boot.median / found["clone"].median
    return [
        Section(
            "debian",
            "Instant clones and warm starts of debian:12",
            _METHOD
            + "The cold boots are `croft run debian:12`, to the first answer of the guest's agent.",
            figures,
            "its cold boot",
            [f"Without any VM held ready a clone is {times:.0f} times faster than a boot."],
        )
    ]
