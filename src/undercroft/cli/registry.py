"""Every command: where it is, and what it does in one line. Reading this imports none of them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.cli.command import Command

# words → (module, class, summary)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("run", "Run", "Create a VM from an image and start it"),
    "ls": ("vms", "Ls", "List VMs"),
    "show": ("vms", "Show", "Show everything about a VM"),
    "set": ("vms", "Set", "Change a VM: CPUs, memory, ports, name, …"),
    "rm": ("vms", "Rm", "Remove VMs and their disks"),
    "start": ("power", "Start", "Switch VMs on"),
    "stop": ("power", "Stop", "Shut VMs down"),
    "restart": ("power", "Restart", "Shut VMs down and start them again"),
    "reset": ("power", "Reset", "Press the reset button"),
    "pause": ("power", "Pause", "Freeze VMs; their memory stays"),
    "resume": ("power", "Resume", "Let paused or suspended VMs go on"),
    "suspend": ("power", "Suspend", "Save VMs' memory to disk and switch them off"),
    "console": ("console", "Console", "Sit down at a VM's serial console"),
    "log": ("console", "Log", "Print what a VM's console said"),
    "screenshot": ("console", "Screenshot", "Save a picture of a VM's display"),
    "shell": ("shell", "Shell", "Open a shell in a VM"),
    "exec": ("guest", "Exec", "Run a program in a VM"),
    "cp": ("copy", "Copy", "Copy files into and out of VMs"),
    "image ls": ("images", "Ls", "List images"),
    "image show": ("images", "Show", "Show everything about an image"),
    "image build": ("images", "Build", "Build an image from packages: tiny, debian:12"),
    "image import": ("images", "Import", "Make an image from a disk file or an address"),
    "image catalogue": ("images", "Catalogue", "List the images that can be fetched by name"),
    "image rm": ("images", "Rm", "Remove images"),
    "snapshot create": ("snapshots", "Create", "Keep what a VM is now"),
    "snapshot ls": ("snapshots", "Ls", "List the snapshots of a VM"),
    "snapshot show": ("snapshots", "Show", "Show everything about a snapshot"),
    "snapshot revert": ("snapshots", "Revert", "Make a VM what it was in a snapshot"),
    "snapshot rm": ("snapshots", "Rm", "Forget snapshots"),
    "clone": ("clones", "Clone", "Make VMs that begin as what another is"),
    "export": ("export", "Export", "Write a VM or a disk into a file for others"),
    "import": ("imports", "Import", "Make a VM of a file: OVA, OVF, or a disk"),
    "backup create": ("backups", "Create", "Back VMs up"),
    "backup ls": ("backups", "Ls", "List backups"),
    "backup show": ("backups", "Show", "Show everything about a backup"),
    "backup verify": ("backups", "Verify", "Read backups and compare with their checksums"),
    "backup restore": ("restore", "Restore", "Make a VM of a backup, or make one what it was"),
    "backup rm": ("backups", "Rm", "Remove backups"),
    "backup prune": ("backups", "Prune", "Remove all backups but some"),
    "template create": ("templates", "Create", "Keep what a VM is, to make others from"),
    "template ls": ("templates", "Ls", "List templates"),
    "template show": ("templates", "Show", "Show everything about a template"),
    "template rm": ("templates", "Rm", "Remove templates"),
    "cdrom ls": ("cdroms", "Ls", "List the CD-ROM drives of a VM"),
    "cdrom insert": ("cdroms", "Insert", "Put a disc into a drive, running or not"),
    "cdrom eject": ("cdroms", "Eject", "Take a disc out of a drive"),
    "cdrom add": ("cdroms", "Add", "Give a VM a drive, running or not"),
    "cdrom rm": ("cdroms", "Rm", "Take a drive away from a VM"),
    "volume create": ("volumes", "Create", "Make a volume that belongs to no VM yet"),
    "volume attach": ("disks", "Attach", "Give a volume to a VM, running or not"),
    "volume detach": ("disks", "Detach", "Take a volume away from its VM"),
    "volume resize": ("disks", "Resize", "Make a volume larger, while its VM runs"),
    "volume set": ("disks", "Set", "Limit what a guest may do with a volume"),
    "volume ls": ("volumes", "Ls", "List volumes: the disks of VMs"),
    "volume show": ("volumes", "Show", "Show everything about a volume"),
    "volume clone": ("volume_layers", "Clone", "Make a volume that begins as another is"),
    "volume tree": ("volume_layers", "Tree", "Show how volumes lie on each other"),
    "volume flatten": ("volume_layers", "Flatten", "Have volumes need nothing of others"),
    "volume usage": ("volume_layers", "Usage", "Show what volumes take on the host"),
    "volume check": ("volume_layers", "Check", "Look for leaks and damage in volumes"),
    "volume rm": ("volumes", "Rm", "Remove volumes that no VM has"),
    "datastore create": ("datastores", "Create", "Make a directory a place for disks"),
    "datastore ls": ("datastores", "Ls", "List datastores, and how full they are"),
    "datastore show": ("datastores", "Show", "Show everything about a datastore"),
    "datastore set": ("datastores", "Set", "Change when a datastore warns, or its name"),
    "datastore rm": ("datastores", "Rm", "Make directories no datastores any more"),
    "task ls": ("tasks", "Ls", "List tasks: what is under way, and how it went"),
    "task show": ("tasks", "Show", "Show everything about a task"),
    "task wait": ("tasks", "Wait", "Wait for tasks, with their progress"),
    "task cancel": ("tasks", "Cancel", "Ask tasks to stop"),
    "events": ("events", "Events", "Show what happened, or follow along"),
    "top": ("top", "Top", "Watch what VMs use"),
    "host show": ("hosts", "Show", "Show this host: QEMU, accelerators, room"),
    "host check": ("hosts", "Check", "Look for what a crash left behind, and repair it"),
    "daemon": ("daemon", "Daemon", "Run the daemon, or ask about it"),
    "token create": ("tokens", "Create", "Let somebody use the API over the network"),
    "token ls": ("tokens", "Ls", "List tokens"),
    "token rm": ("tokens", "Rm", "Take tokens back"),
    "completion": ("completion", "Completion", "Print what makes a shell complete croft"),
    "version": ("version", "Version", "Print the version of croft and of the daemon"),
    "help": ("help", "Help", "Explain croft, or one of its commands"),
}

NOUNS = {
    "image": "Images: what VMs are made from",
    "template": "Templates: frozen VMs to make others from",
    "snapshot": "Snapshots: VMs as they were",
    "backup": "Backups: VMs as they were, kept elsewhere",
    "volume": "Volumes: the disks of VMs",
    "cdrom": "CD-ROM drives of VMs, and the discs in them",
    "datastore": "Datastores: where disks are kept",
    "task": "Tasks: what is under way",
    "host": "This host",
    "token": "Tokens: access to the API over the network",
}

# The tour: themes in the order in which a new user meets them.
THEMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Run virtual machines", ("run", "ls", "show", "set", "rm")),
    ("Switch them", ("start", "stop", "restart", "reset", "pause", "resume", "suspend")),
    ("Keep them as they are", ("snapshot create", "snapshot ls", "snapshot revert", "snapshot rm")),
    (
        "Keep them elsewhere",
        ("backup create", "backup ls", "backup verify", "backup restore", "backup prune"),
    ),
    ("Make more of them", ("clone", "template create", "template ls", "template rm")),
    ("In and out", ("import", "export")),
    ("Get into them", ("shell", "console", "exec", "cp", "log", "screenshot")),
    (
        "What they are made from",
        ("image ls", "image build", "image import", "image catalogue"),
    ),
    (
        "Their disks and discs",
        (
            "volume create",
            "volume attach",
            "volume resize",
            "volume ls",
            "datastore create",
            "datastore ls",
            "cdrom insert",
            "cdrom eject",
        ),
    ),
    ("What is going on", ("top", "events", "task ls", "host show", "host check")),
    ("Undercroft itself", ("daemon", "token create", "completion", "version", "help")),
)

# What people who come from elsewhere type and is taken as it is; the rest: hints.py.
ALIASES = {
    "ps": "ls",
    "list": "ls",
    "info": "show",
    "inspect": "show",
    "logs": "log",
    "remove": "rm",
    "images": "image ls",
    "snapshots": "snapshot ls",
    "snapshot list": "snapshot ls",
    "snapshot take": "snapshot create",
    "snapshot remove": "snapshot rm",
    "templates": "template ls",
    "backups": "backup ls",
    "backup list": "backup ls",
    "backup remove": "backup rm",
    "template list": "template ls",
    "template remove": "template rm",
    "cdrom list": "cdrom ls",
    "cdrom remove": "cdrom rm",
    "volumes": "volume ls",
    "volume list": "volume ls",
    "volume remove": "volume rm",
    "volume inspect": "volume show",
    "datastores": "datastore ls",
    "datastore list": "datastore ls",
    "datastore remove": "datastore rm",
    "tasks": "task ls",
    "event": "events",
    "image list": "image ls",
    "image inspect": "image show",
    "image remove": "image rm",
    "image catalog": "image catalogue",
}


def load(words: str) -> type[Command]:
    """The class of a command; imports its module.

    Raises:
        KeyError: no such command.
    """
    from importlib import import_module

    module, name, _ = COMMANDS[words]
    found: type[Command] = getattr(import_module(f"undercroft.cli.{module}"), name)
    return found


def resolve(argv: list[str]) -> tuple[str, list[str]] | None:
    """The command that the words begin with, and what follows it; None if there is none."""
    if not argv:
        return None
    two = " ".join(argv[:2])
    for words, count in ((two, 2), (argv[0], 1)):
        words = ALIASES.get(words, words)
        if words in COMMANDS:
            return words, argv[count:]
    return None
