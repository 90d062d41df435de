"""What people who come from elsewhere type, and what it is called here.

The command that is meant is only said: to do it could remove what was not meant.
"""

from __future__ import annotations

from undercroft.cli.registry import ALIASES, COMMANDS, NOUNS

# Programs whose words follow: virsh destroy web1.
_PROGRAMS = {"qm", "virsh", "docker", "podman", "vmrun", "pct"}
# Other words for our nouns; vm stands for commands without one.
_NOUNS = {
    "disk": "volume",
    "disks": "volume",
    "vol": "volume",
    "cd": "cdrom",
    "dvd": "cdrom",
    "storage": "datastore",
    "pool": "datastore",
    "snap": "snapshot",
    "job": "task",
    "node": "host",
    "vm": "",
    "domain": "",
    "container": "",
}
# Other words for our verbs; the first that a noun has is meant.
_VERBS = {
    "delete": ("rm",),
    "del": ("rm",),
    "destroy": ("rm",),
    "erase": ("rm",),
    "remove": ("rm",),
    "undefine": ("rm",),
    "list": ("ls",),
    "info": ("show",),
    "inspect": ("show",),
    "add": ("create",),
    "new": ("create",),
    "make": ("create",),
    "take": ("create",),
    "save": ("create",),
    "apply": ("revert", "restore"),
    "restore": ("restore", "revert"),
    "rollback": ("revert", "restore"),
    "copy": ("clone",),
    "cp": ("clone",),
    "extend": ("resize",),
    "grow": ("resize",),
    "connect": ("attach", "insert"),
    "mount": ("attach", "insert"),
    "disconnect": ("detach", "eject"),
    "umount": ("detach", "eject"),
    "unmount": ("detach", "eject"),
    "edit": ("set",),
    "modify": ("set",),
    "update": ("set",),
    "rename": ("set",),
    "pull": ("import",),
}
# What the tables above do not say, or would say wrongly.
ELSEWHERE = {
    "destroy": "croft stop --force VM switches a VM off, croft rm VM removes it",
    "undefine": "croft rm VM",
    "delete": "croft rm VM",
    "kill": "croft stop --force VM",
    "shutdown": "croft stop VM",
    "poweroff": "croft stop VM, or with --force at once",
    "reboot": "croft restart VM",
    "create": "croft run IMAGE --no-start",
    "virt-install": "croft run IMAGE, or croft run --cdrom ISO --disk 20G",
    "save": "croft suspend VM",
    "managedsave": "croft suspend VM",
    "restore": "croft resume VM, or croft backup restore BACKUP",
    "unpause": "croft resume VM",
    "attach": "croft console VM, or croft volume attach VOLUME VM",
    "terminal": "croft console VM",
    "attach-disk": "croft volume attach VOLUME VM",
    "detach-disk": "croft volume detach VOLUME",
    "unlink": "croft volume detach VOLUME",
    "resize": "croft volume resize VOLUME SIZE",
    "blockresize": "croft volume resize VOLUME SIZE",
    "blkdeviotune": "croft volume set VOLUME --iops N",
    "rollback": "croft snapshot revert VM SNAPSHOT",
    "snapshot-create": "croft snapshot create VM",
    "snapshot-create-as": "croft snapshot create VM SNAPSHOT",
    "snapshot-revert": "croft snapshot revert VM SNAPSHOT",
    "snapshot-delete": "croft snapshot rm VM SNAPSHOT",
    "snapshot-list": "croft snapshot ls VM",
    "setvcpus": "croft set VM --cpus N",
    "setmem": "croft set VM --memory SIZE",
    "importovf": "croft import FILE",
    "importdisk": "croft import FILE",
    "eject": "croft cdrom eject VM",
    "iso": "an ISO is a file, not kept here: croft cdrom insert VM FILE, croft run --cdrom FILE",
    "change-media": "croft cdrom insert VM ISO, croft cdrom eject VM",
    "ssh": "croft shell VM",
    "pull": "croft image import FILE|URL, or croft run NAME fetches by itself",
    "build": "croft image build tiny|debian:12",
    "edit": "croft set VM …",
    "rename": "croft set VM --name NEW",
    "stats": "croft top",
    "monitor": "croft top, or croft events --follow",
    "nodeinfo": "croft host show",
    "dominfo": "croft show VM",
    "domifaddr": "croft show VM",
    "volume rename": "a volume keeps its name: croft volume clone VOLUME NEW, then croft volume rm",
    "volume move": "croft volume clone VOLUME NEW --datastore DATASTORE, then croft volume rm",
    "volume migrate": "croft volume clone VOLUME NEW --datastore DATASTORE, then croft volume rm",
    "volume snapshot": "croft snapshot create VM",
    "snapshot rename": "a snapshot keeps its name",
    "template rename": "a template keeps its name",
    "image rename": "an image keeps its name",
    "image tag": "an image keeps its name",
    "image pull": "croft image import FILE|URL, or croft run NAME fetches by itself",
    "backup delete": "croft backup rm BACKUP, or croft backup prune",
    "cdrom attach": "croft cdrom add VM, croft cdrom insert VM ISO",
}
# Options of other programs, by command.
OPTIONS = {
    "set": {
        "--disk": "croft volume resize VOLUME SIZE; one more: croft volume create NAME --size SIZE,"
        " croft volume attach NAME VM",
        "--volume": "croft volume attach VOLUME VM",
        "--cdrom": "croft cdrom insert VM ISO",
    }
}


def elsewhere(words: list[str]) -> str | None:
    """What is meant by words that croft does not know; None: they are no others' either."""
    if not words:
        return None
    first, *rest = words
    if first in _PROGRAMS:
        return _of_program(rest)
    noun = _NOUNS.get(first, first)
    verb = rest[0] if rest else ""
    if hint := ELSEWHERE.get(f"{noun} {verb}" if noun and verb else first):
        return hint
    if first in ELSEWHERE:
        return ELSEWHERE[first]
    if noun == "":
        found = ALIASES.get(verb, verb)
        return f"croft {found}" if found in COMMANDS else elsewhere(rest) or "croft help"
    if noun not in NOUNS:
        return None
    for ours in _VERBS.get(verb, (verb,)):
        meant = ALIASES.get(f"{noun} {ours}", f"{noun} {ours}")
        if meant in COMMANDS:
            return f"croft {meant}"
    return f"croft {noun}" if noun != first else None


def _of_program(rest: list[str]) -> str:
    """What is meant by what follows another program's name."""
    from undercroft.cli.registry import resolve

    if found := resolve(rest):
        return f"croft {found[0]}"
    return elsewhere(rest) or "croft help"
