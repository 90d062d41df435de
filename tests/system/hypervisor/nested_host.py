"""A host with real KVM, to run Python in: an emulated machine whose CPU has AMD-V.

Its kernel is Debian's; its programs (Python, QEMU, setpriv) and their libraries are this host's, at
the same places.
"""

from __future__ import annotations

import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import undercroft
from tests.system.built_images import built
from undercroft.model.image import ImageContent, ImageDefaults
from undercroft.storage.build.apt import SUITES, PrivateApt, find_sources
from undercroft.storage.build.cpio import CpioWriter
from undercroft.storage.build.kernel import find_kernel, select_modules

_PACKAGES = ["linux-image-amd64", "busybox-static"]
_REPORT = "report: "
_INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
{insert}
export PATH=/bin:/usr/bin:/usr/local/bin PYTHONHOME={home} PYTHONPATH={path}
{python} -s -S /task.py
/bin/busybox poweroff -f
"""
# Run here first, to learn what the task imports.
_TRACE = """
import json, runpy, sys
runpy.run_path(sys.argv[1], run_name="__main__")
print(json.dumps([m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]))
"""


async def _fetch(target: Path, tmp: Path) -> ImageContent:
    """The kernel, its KVM modules in the order to load them, and busybox."""
    apt = PrivateApt(tmp / "apt", await find_sources(SUITES["12"]))
    await apt.update()
    kept = re.compile(r"busybox-static|linux-image-[0-9].*")
    debs = await apt.fetch([p for p in await apt.plan(*_PACKAGES) if kept.fullmatch(p.name)])
    root = tmp / "root"
    root.mkdir()
    await apt.unpack(debs, root)
    kernel = find_kernel(root)
    shutil.copyfile(kernel.image, target / "kernel")
    for index, module in enumerate(select_modules(kernel, ["kvm_amd"])):
        (target / f"{index}-{module.name}.ko").write_bytes(module.data)
    [busybox] = root.glob("**/bin/busybox")
    shutil.copyfile(busybox, target / "busybox")
    return ImageContent(
        arch="x86_64", os="Debian's kernel", kernel="kernel", defaults=ImageDefaults()
    )


def _libraries(binary: Path) -> set[Path]:
    text = subprocess.run(["ldd", binary], capture_output=True, text=True).stdout
    return {Path(path) for path in re.findall(r"(?:=> |^\t)(/\S+)", text, re.MULTILINE)}


def _imported(task: Path, environment: dict[str, str]) -> list[Path]:
    traced = subprocess.run(
        [sys.executable, "-c", _TRACE, task],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(name) for name in json.loads(traced.stdout.splitlines()[-1])]


def _initramfs(parts: Path, task: Path, work: Path) -> Path:
    sources = str(Path(undercroft.__file__).parents[1])
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([sources, *packages])}
    python = Path(os.path.realpath(sys.executable))
    setpriv, qemu = (shutil.which(name) for name in ("setpriv", "qemu-system-x86_64"))
    assert setpriv is not None
    assert qemu is not None
    programs = [python, Path(setpriv), Path(os.path.realpath(qemu))]
    modules = _imported(task, environment)
    binaries = [*programs, *(path for path in modules if path.suffix == ".so")]
    data = list((Path(undercroft.__file__).parent / "hypervisor").glob("*.bin"))
    libraries = set[Path]().union(*map(_libraries, binaries))

    initramfs = work / "initramfs"
    with initramfs.open("wb") as out:
        archive = CpioWriter(out)
        for directory in ("dev", "proc", "sys", "tmp"):
            archive.directory(directory)
        archive.character_device("dev/console", 5, 1)
        archive.file("bin/busybox", (parts / "busybox").read_bytes(), 0o755)
        archive.file("task.py", task.read_bytes())
        for path in sorted({*binaries, *libraries, *data}):
            archive.file(str(path).lstrip("/"), path.read_bytes(), 0o755)
        for path in sorted({path for path in modules if path.suffix == ".py"}):
            # Compiled here: there it would take seconds, and be too old by its date.
            compiled = work / "module.pyc"
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(str(path), cfile=str(compiled), invalidation_mode=mode, doraise=True)
            place = path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
            archive.file(str(path).lstrip("/"), path.read_bytes())
            archive.file(str(place).lstrip("/"), compiled.read_bytes())
        insert = []
        for module in sorted(parts.glob("*.ko")):
            archive.file(module.name, module.read_bytes())
            insert.append(f"/bin/busybox insmod /{module.name}")
        init = _INIT.format(
            insert="\n".join(insert),
            home=sys.base_prefix,
            path=environment["PYTHONPATH"],
            python=python,
        )
        archive.file("init", init.encode(), 0o755)
        archive.close()
    return initramfs


def run_on_kvm_host(task: str, work: Path, timeout: float = 240) -> Any:
    """Runs Python code on such a host; it is to ``print("report: " + JSON)``, which is returned.

    The code is run here first, so it must do here, without KVM, what makes it import everything.
    """
    parts = built("kvm-host", _fetch, _PACKAGES)
    script = work / "task.py"
    script.write_text(task)
    result = subprocess.run(
        [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-M", "q35", "-accel", "tcg", "-cpu", "max,+svm,+npt", "-m", "768"),
            *("-display", "none", "-serial", "stdio", "-kernel", parts / "kernel"),
            *("-initrd", _initramfs(parts, script, work)),
            *("-append", "console=ttyS0 quiet panic=-1"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout,
    )
    output = result.stdout.decode(errors="replace")
    for line in output.splitlines():
        if line.startswith(_REPORT):
            return json.loads(line.removeprefix(_REPORT))
    raise AssertionError(f"no report, but {output[-5000:]} {result.stderr[-2000:]!r}")
