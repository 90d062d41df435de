"""Images that are not there yet: builds or fetches what is known by name."""

from __future__ import annotations

import os

from undercroft.cli.errors import ours
from undercroft.cli.output import dig
from undercroft.cli.progress import report_failures, wait
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from undercroft.cli.context import Croft

BUILT = {
    "tiny": "a Linux of busybox and a kernel, in memory",
    "debian:12": "Debian 12 with systemd, cloud-init, guest agent and SSH",
}


def ensure_image(croft: Croft, name: str) -> Any | int:
    """The image, once it is ready; an exit code where it could not be made (the user was told).

    Raises:
        NotFoundError: there is no such image, and none is known by that name.
    """
    image = _get(croft, name)
    state = dig(image, "status.state")
    if state == "ready":
        return image
    if state == "pending":
        tasks = [task for id in image.get("tasks", ()) if (task := _task(croft, id))]
        if tasks:
            croft.note(f"image {name} is being made already")
    elif (request := _request(croft, name, replace=image is not None)) is not None:
        verb = "building" if request["source"] == "build" else "fetching"
        croft.note(f"{verb} image {name}, once")
        tasks = [croft.api.post("/v1/images", request)]
    elif image is not None:
        tasks = []
    else:
        raise _unknown(croft, name)
    tasks = wait(croft, tasks)
    if code := report_failures(croft, tasks):
        return code
    return croft.api.get(f"/v1/images/{quote(name)}")


def _get(croft: Croft, name: str) -> Any:
    try:
        return croft.api.get(f"/v1/images/{quote(name)}")
    except Exception as error:
        known = ours(error)
        if known is None or known.code != "not-found":
            raise
        return None


def _task(croft: Croft, id: str) -> Any:
    try:
        return croft.api.get(f"/v1/tasks/{quote(id)}")
    except Exception as error:
        known = ours(error)
        if known is None or known.code != "not-found":
            raise
        return None


def _request(croft: Croft, name: str, replace: bool) -> dict[str, object] | None:
    """What makes the image of this name, if it is one that is known."""
    if name in BUILT:
        source = "build"
    elif name in catalogue_names(croft):
        source = "catalogue"
    else:
        return None
    return {"source": source, "value": name, "name": name, "replace": replace}


def catalogue_names(croft: Croft) -> list[str]:
    """The names that can be fetched."""
    return [str(dig(item, "name")) for item in croft.api.get("/v1/catalogue")["items"]]


def template_names(croft: Croft) -> list[str]:
    """The names of templates; none where they may not be seen."""
    try:
        items = list(croft.api.list("/v1/templates", {"fields": "meta.name"}))
    except Exception as error:
        if ours(error) is None:
            raise
        return []
    return [str(dig(item, "meta.name")) for item in items]


def _unknown(croft: Croft, name: str) -> Exception:
    from undercroft.model.errors import NotFoundError

    if os.path.exists(name):
        return NotFoundError(
            f"there is no image {name}, but a file of that name",
            action=f"make an image of it: croft image import {name} --name NAME",
        )
    if name in template_names(croft):
        return NotFoundError(
            f"there is no image {name}, but a template",
            action=f"make a VM of it: croft clone {name} NAME --start",
        )
    return NotFoundError(f"image {name} not found", object=f"image {name}")
