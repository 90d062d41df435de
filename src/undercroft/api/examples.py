"""Examples of request bodies, by operation id. A test sends each of them."""

from __future__ import annotations

from typing import Any

EXAMPLES: dict[str, dict[str, Any]] = {
    "createVM": {
        "name": "web1",
        "image": "debian:12",
        "cpus": 2,
        "memory": 1 << 30,
        "disk": 10 << 30,
        "forwards": [{"guest_port": 80, "host_port": 8080}],
        "guest": {"user": "ada"},
        "labels": {"env": "prod"},
        "start": True,
    },
    "changeVM": {"cpus": 4, "memory": 2 << 30},
    "stopVM": {"timeout": 30.0},
    "restartVM": {"force": True},
    "createSnapshot": {"name": "before-upgrade", "description": "all is well", "memory": True},
    "revertSnapshot": {"force": True},
    "createCheckpoint": {"owner": "nightly", "quiesce": True},
    "backUpVM": {"repository": "/backup/vms", "quiesce": True},
    "streamBackup": {"description": "before the upgrade"},
    "verifyBackups": {"repository": "/backup/vms", "backups": ["web1"]},
    "restoreBackup": {"repository": "/backup/vms", "backup": "web1", "name": "web2"},
    "pruneBackups": {"repository": "/backup/vms", "last": 7, "weekly": 4},
    "cloneVM": {"names": ["web2", "web3"], "mode": "linked", "start": True},
    "createTemplate": {"name": "debian-warm", "source": "web1", "memory": True},
    "cloneTemplate": {"count": 10},
    "createExport": {"vm": "web1", "format": "ova"},
    "createImport": {"path": "/srv/web1.ova", "file": "web1.ova", "name": "web1"},
    "examineImport": {"path": "/srv/web1.ova", "file": "web1.ova"},
    "execInVM": {"argv": ["uname", "-a"], "timeout": 10.0},
    "createVolume": {"name": "data1", "size": 20 << 30},
    "cloneVolume": {"name": "data2", "full": False},
    "createDatastore": {"name": "fast", "path": "/srv/nvme/vms"},
    "changeDatastore": {"warning": 0.7},
    "checkVolumes": {"repair": False},
    "changeVolume": {"iops": 500, "bandwidth": 10 << 20},
    "attachVolume": {"vm": "web1", "bus": "scsi"},
    "resizeVolume": {"size": 40 << 30},
    "createImage": {"source": "build", "value": "debian:12"},
    "checkHost": {"repair": False},
}
