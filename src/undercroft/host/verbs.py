"""Which function carries out which verb on a VM."""

from __future__ import annotations

from undercroft.host import (
    cdroms,
    checkpoints,
    creation,
    disks,
    forgetting,
    power,
    restoring,
    reverting,
    snapshots,
    templates,
    volume_clone,
)
from undercroft.host.actor import Verb

VM_VERBS: dict[str, Verb] = {
    "vm.create": creation.create,
    "vm.create.undo": creation.undo,
    "vm.remove": creation.remove,
    "vm.start": power.start,
    "vm.stop": power.stop,
    "vm.restart": power.restart,
    "vm.reset": power.reset,
    "vm.pause": power.pause,
    "vm.resume": power.resume,
    "vm.suspend": power.suspend,
    "snapshot.create": snapshots.take,
    "snapshot.create.undo": snapshots.undo,
    "snapshot.revert": reverting.revert,
    "snapshot.revert.undo": reverting.undo,
    "snapshot.remove": forgetting.remove,
    "volume.attach": disks.attach,
    "volume.detach": disks.detach,
    "volume.resize": disks.resize,
    "volume.limit": disks.limit,
    "cdrom.add": cdroms.add,
    "cdrom.remove": cdroms.remove,
    "cdrom.insert": cdroms.insert,
    "cdrom.eject": cdroms.eject,
    "template.create": templates.create,
    "template.create.undo": templates.undo,
    "volume.clone": volume_clone.clone_attached,
    "volume.clone.undo": snapshots.undo,
    "volume.flatten": volume_clone.flatten_attached,
    "backup.restore": restoring.restore_over,
    "checkpoint.create": checkpoints.create,
    "checkpoint.create.undo": snapshots.undo,
    "checkpoint.release": checkpoints.release,
}
