"""Who may do what. Privileges are named after what they open: ``vm.power``, ``image.create``."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.model.errors import ForbiddenError

PRIVILEGES = frozenset(
    {
        "vm.view",
        "vm.create",
        "vm.power",
        "vm.change",
        "vm.snapshot",
        "vm.backup",  # checkpoints, and reading all that is on its disks
        "vm.remove",
        "vm.console",
        "vm.guest",  # exec and files inside the guest
        "template.view",
        "template.create",
        "template.remove",
        "export.view",
        "export.create",
        "export.remove",
        "image.view",
        "image.create",
        "image.remove",
        "volume.view",
        "volume.create",
        "volume.change",  # attach, detach, resize, limit, flatten
        "volume.remove",
        "datastore.view",
        "datastore.create",
        "datastore.change",
        "datastore.remove",
        "task.view",
        "task.cancel",
        "event.view",
        "host.view",
        "host.check",
        "host.files",  # have the daemon read files of the host, for images, and write backups
    }
)
VIEW = frozenset(name for name in PRIVILEGES if name.endswith(".view"))
ALL = "*"


@dataclass(frozen=True, slots=True)
class Caller:
    """Someone who asks. ``privileges`` may hold `ALL`."""

    name: str
    privileges: frozenset[str]

    def has(self, privilege: str) -> bool:
        """Whether the caller holds the privilege."""
        return ALL in self.privileges or privilege in self.privileges

    def require(self, privilege: str) -> None:
        """Does nothing if the caller holds the privilege.

        Raises:
            ForbiddenError: they do not.
        """
        if not self.has(privilege):
            raise ForbiddenError(
                f"{self.name} lacks the privilege {privilege}",
                action="ask an administrator for it",
                privilege=privilege,
            )


SYSTEM = Caller("system", frozenset({ALL}))
