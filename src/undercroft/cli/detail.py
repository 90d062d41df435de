"""Objects in full, for people."""

from __future__ import annotations

import time

from undercroft.cli.errors import ours
from undercroft.cli.output import ago, cpus, dig, fields, local_time, size
from undercroft.cli.vms import forwards, port_text
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from undercroft.cli.context import Croft

Pairs = list[tuple[str, str]]


def vm_detail(croft: Croft, vm: Any) -> str:
    """A VM."""
    style = croft.out
    name = dig(vm, "meta.name", "")
    state = dig(vm, "status.state", "")
    instance = dig(vm, "status.instance")
    now = time.time()
    line = style.state(state)
    if instance:
        line += f" for {ago(now - instance['started'])}"
    if message := dig(vm, "status.message"):
        line += f": {style.clean(message)}"
    pairs: Pairs = [
        ("image", _name(croft, "images", dig(vm, "spec.image"))),
        ("cpus", str(dig(vm, "spec.cpus", ""))),
        ("memory", size(dig(vm, "spec.memory"))),
    ]
    if instance and instance.get("generation") != dig(vm, "meta.generation"):
        running = f"{cpus(instance.get('cpus'))}, {size(instance.get('memory'))}"
        wanted = f"{cpus(dig(vm, 'spec.cpus'))}, {size(dig(vm, 'spec.memory'))}"
        if running != wanted:
            pairs.append(("", f"runs with {running}; the rest comes with: croft restart {name}"))
    pairs += [("disk", text) for text in _disks(croft, vm)]
    pairs += [("cdrom", text) for text in _cdroms(style.clean, vm)]
    pairs.append(("machine", _machine(vm)))
    pairs += _network(croft, vm)
    pairs += _guest(vm)
    if shares := dig(vm, "status.shares"):
        texts = ", ".join(map(style.clean, shares))
        pairs.append(("shares", f"{texts}, with what it was cloned from"))
    pairs.append(("restart", str(dig(vm, "spec.restart", ""))))
    if restarts := dig(vm, "status.restarts"):
        pairs.append(("", f"{restarts} times since it was last started by hand"))
    if instance:
        pairs.append(("process", f"pid {instance.get('pid')}, QEMU {instance.get('qemu', '?')}"))
    if last := dig(vm, "status.last_exit"):
        pairs.append(("last run", _exit(last)))
    if labels := dig(vm, "meta.labels"):
        pairs.append(("labels", "\n".join(f"{k}={v}" for k, v in sorted(labels.items()))))
    pairs.append(("created", local_time(dig(vm, "meta.created", 0))))
    pairs.append(("id", dig(vm, "meta.id", "")))
    body = fields(style, [(a, b) for a, b in pairs if b])
    return f"{style.paint(name, 'bold')}  {line}\n" + _indent(body)


def _indent(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def _name(croft: Croft, noun: str, id: str | None) -> str:
    """The name that belongs to an id, or the id where the object is gone."""
    if not id:
        return ""
    try:
        return str(dig(croft.api.get(f"/v1/{noun}/{quote(id)}"), "meta.name", id))
    except Exception as error:
        if ours(error) is None:
            raise
        return id


def _disks(croft: Croft, vm: Any) -> list[str]:
    found = []
    for disk in dig(vm, "spec.disks", ()):
        text = str(disk.get("volume"))
        try:
            volume = croft.api.get(f"/v1/volumes/{quote(disk['volume'])}")
        except Exception as error:
            if ours(error) is None:
                raise
            found.append(text)
            continue
        text = f"{size(dig(volume, 'spec.size'))} {disk.get('bus', 'virtio')}"
        if allocated := dig(volume, "status.allocated"):
            text += f", {size(allocated)} of it in use on the host"
        found.append(f"{text} ({dig(volume, 'meta.name')})")
    return found


def _cdroms(clean: Callable[[str], str], vm: Any) -> list[str]:
    found = []
    for drive in dig(vm, "spec.cdroms", ()):
        medium = drive.get("medium")
        text = f"drive {drive.get('unit', 0)} on {drive.get('bus', 'sata')}: "
        found.append(text + (clean(medium) if medium else "empty"))
    return found


def _machine(vm: Any) -> str:
    spec = vm.get("spec", {})
    parts = [spec.get("machine"), spec.get("arch"), f"{spec.get('firmware')} boot"]
    parts += ["a disc first"] if spec.get("boot") == "cdrom" else []
    parts += ["secure boot"] if spec.get("secure_boot") else []
    parts += ["TPM"] if spec.get("tpm") else []
    parts.append(
        f"display {spec.get('display')}" if spec.get("display") != "none" else "no display"
    )
    accelerator = dig(vm, "status.instance.accelerator") or spec.get("accelerator")
    parts.append(f"accelerator {accelerator}")
    return ", ".join(str(part) for part in parts if part)


def _network(croft: Croft, vm: Any) -> Pairs:
    pairs: Pairs = []
    for port in dig(vm, "spec.ports", ()):
        pairs.append(("network", f"{port.get('mode', 'user')}, {port.get('mac')}"))
    if not pairs:
        pairs.append(("network", "none"))
    if addresses := dig(vm, "status.addresses"):
        pairs.append(("address", ", ".join(addresses)))
    pairs += [("port", port_text(croft, f, address=True)) for f in forwards(vm)]
    return pairs


def _guest(vm: Any) -> Pairs:
    guest = dig(vm, "spec.guest", {})
    told = [f"user {guest['user']}"] if guest.get("user") else []
    told += [f"hostname {guest['hostname']}"] if guest.get("hostname") else []
    if keys := guest.get("ssh_keys"):
        told.append(f"{len(keys)} SSH key" + ("s" if len(keys) > 1 else ""))
    told += ["a password"] if guest.get("password_hash") else []
    told += ["user-data"] if guest.get("user_data") else []
    pairs: Pairs = [("guest", ", ".join(told))]
    agent = dig(vm, "status.agent")
    if agent is not None:
        pairs.append(("agent", "answers" if agent else "does not answer"))
    return pairs


def _exit(last: Any) -> str:
    text = str(last.get("reason", ""))
    if (time_of := last.get("time")) is not None:
        text += f", {local_time(time_of)}"
    if message := last.get("message"):
        text += f": {message}"
    return text


def image_detail(croft: Croft, image: Any) -> str:
    """An image."""
    style = croft.out
    state = dig(image, "status.state", "")
    line = style.state(state)
    if message := dig(image, "status.message"):
        line += f": {style.clean(message)}"
    content = dig(image, "status.content", {})
    source = f"{dig(image, 'spec.source')} {dig(image, 'spec.value', '')}"
    pairs: Pairs = [("from", source), ("system", content.get("os", ""))]
    if content:
        pairs.append(("for", content.get("arch", "")))
        if content.get("virtual_size"):
            disk = f"{size(content['virtual_size'])} {content.get('disk_format', '')}"
            pairs.append(("disk", disk))
        pairs.append(("on this host", size(dig(image, "status.size"))))
        has = [
            text
            for key, text in (
                ("cloud_init", "cloud-init"),
                ("agent", "guest agent"),
                ("ssh", "SSH server"),
                ("kernel", "its own kernel"),
            )
            if content.get(key)
        ]
        pairs.append(("has", ", ".join(has)))
        defaults = content.get("defaults") or {}
        shape = f"{cpus(defaults.get('cpus', 1))}, {size(defaults.get('memory'))}"
        shape += f", {defaults.get('machine')}, {defaults.get('firmware')} boot"
        if defaults.get("user"):
            shape += f", user {defaults['user']}"
        pairs.append(("VMs get", shape))
    pairs.append(("checksum", dig(image, "spec.sha256", "")))
    pairs.append(("digest", dig(image, "status.digest", "")))
    pairs.append(("created", local_time(dig(image, "meta.created", 0))))
    pairs.append(("id", dig(image, "meta.id", "")))
    body = fields(style, [(a, b) for a, b in pairs if b])
    return f"{style.paint(dig(image, 'meta.name', ''), 'bold')}  {line}\n" + _indent(body)


def task_detail(croft: Croft, task: Any) -> str:
    """A task."""
    style = croft.out
    state = dig(task, "status.state", "")
    progress = dig(task, "status.progress")
    line = style.state(state)
    if state == "running" and progress is not None:
        line += f" {progress:.0%}"
    object = f"{dig(task, 'spec.object.kind', '')} {dig(task, 'spec.object.name', '')}"
    pairs: Pairs = [("about", object), ("phase", dig(task, "status.phase", ""))]
    if error := dig(task, "status.error"):
        pairs.append(("error", f"{error.get('detail')} ({error.get('code')})"))
        pairs.append(("what to do", error.get("action") or ""))
    pairs.append(("asked by", dig(task, "spec.by", "")))
    pairs.append(("created", local_time(dig(task, "meta.created", 0))))
    for key in ("started", "finished"):
        if (moment := dig(task, f"status.{key}")) is not None:
            pairs.append((key, local_time(moment)))
    pairs.append(("id", dig(task, "meta.id", "")))
    body = fields(style, [(a, b) for a, b in pairs if b])
    return f"{style.paint(dig(task, 'spec.verb', ''), 'bold')}  {line}\n" + _indent(body)


def snapshot_detail(croft: Croft, snapshot: Any) -> str:
    """A snapshot."""
    style = croft.out
    status = dig(snapshot, "status", {})
    kept = "disks and memory" if status.get("memory") else "disks"
    if status.get("quiesced"):
        kept += ", file systems in order"
    shape = status.get("shape") or {}
    stood = status.get("stood_still")
    pairs: Pairs = [
        ("what for", style.clean(dig(snapshot, "spec.description", ""))),
        ("of", _name(croft, "vms", dig(snapshot, "spec.vm"))),
        ("keeps", kept),
        ("memory", size(status["memory"]) if status.get("memory") else ""),
        ("guest stood still", f"{stood * 1000:.1f} ms" if stood is not None else ""),
        ("shape", f"{shape.get('cpus')} CPUs, {size(shape.get('memory'))}" if shape else ""),
        ("taken", local_time(dig(snapshot, "meta.created", 0))),
        ("id", dig(snapshot, "meta.id", "")),
    ]
    body = fields(style, [(a, b) for a, b in pairs if b])
    line = style.state(status.get("state", ""))
    return f"{style.paint(dig(snapshot, 'meta.name', ''), 'bold')}  {line}\n" + _indent(body)


def template_detail(croft: Croft, template: Any) -> str:
    """A template."""
    style = croft.out
    status = dig(template, "status", {})
    shape = status.get("shape") or {}
    memory = status.get("memory")
    disks = ", ".join(size(disk.get("size")) for disk in status.get("disks", ()))
    pairs: Pairs = [
        ("what for", style.clean(dig(template, "spec.description", ""))),
        ("from", _name(croft, "vms", dig(template, "spec.source"))),
        ("keeps", "disks and memory: clones go on from there" if memory else "disks"),
        ("memory", f"takes {size(memory)}, once for all clones" if memory else ""),
        ("disks", disks),
        ("image", _name(croft, "images", shape.get("image"))),
        ("shape", f"{cpus(shape.get('cpus'))}, {size(shape.get('memory'))}" if shape else ""),
        ("created", local_time(dig(template, "meta.created", 0))),
        ("id", dig(template, "meta.id", "")),
    ]
    body = fields(style, [(a, b) for a, b in pairs if b])
    line = style.state(status.get("state", ""))
    return f"{style.paint(dig(template, 'meta.name', ''), 'bold')}  {line}\n" + _indent(body)


def volume_detail(croft: Croft, volume: Any) -> str:
    """A volume."""
    style = croft.out
    line = style.state(dig(volume, "status.state", ""))
    if message := dig(volume, "status.message"):
        line += f": {style.clean(message)}"
    pairs: Pairs = [
        ("size", size(dig(volume, "spec.size"))),
        ("on this host", size(dig(volume, "status.allocated"))),
        ("encrypted", "with a key of its own" if dig(volume, "spec.encrypted") else ""),
        ("datastore", _name(croft, "datastores", dig(volume, "status.datastore"))),
        ("image", _name(croft, "images", dig(volume, "spec.image"))),
        ("vm", _name(croft, "vms", dig(volume, "spec.attached") or dig(volume, "spec.vm"))),
        ("limits", limits_text(dig(volume, "spec.limits", {}))),
        ("created", local_time(dig(volume, "meta.created", 0))),
        ("id", dig(volume, "meta.id", "")),
    ]
    body = fields(style, [(a, b) for a, b in pairs if b])
    return f"{style.paint(dig(volume, 'meta.name', ''), 'bold')}  {line}\n" + _indent(body)


def limits_text(limits: Any) -> str:
    """Of operations and bytes per second."""
    kinds = ("", ""), ("read_", "of reading"), ("write_", "of writing")
    found = []
    for prefix, what in kinds:
        of = f" {what}" if prefix else ""
        if iops := dig(limits, f"{prefix}iops"):
            found.append(f"{iops} operations{of}")
        if bandwidth := dig(limits, f"{prefix}bandwidth"):
            found.append(f"{size(bandwidth)}{of}")
    if not found:
        return ""
    burst = dig(limits, "burst", 0)
    more = f" (ten times as much for {burst} s)" if burst else ""
    return f"{', '.join(found)} per second{more}"
