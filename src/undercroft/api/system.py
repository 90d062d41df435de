"""What answers, whether it is well, and what it measures."""

from __future__ import annotations

import os

from litestar import Response, get

from undercroft.api.answers import AnyRequest, caller, errors, operations
from undercroft.api.metrics import render_metrics
from undercroft.model.requests import VersionInfo


@get(
    "/v1",
    operation_id="getVersion",
    summary="Show what answers",
    tags=["system"],
    responses=errors(),
)
async def version(request: AnyRequest) -> Response[VersionInfo]:
    """Product, version, host, data directory and process."""
    from undercroft import __version__

    state = request.app.state
    info = VersionInfo(
        product="Undercroft",
        version=__version__,
        api="v1",
        host=operations(request).host,
        data=state["data"],
        pid=os.getpid(),
    )
    return Response(content=info, media_type="application/json")


@get(
    "/healthz",
    operation_id="getHealth",
    summary="Tell whether the daemon and its store answer",
    tags=["system"],
    media_type="text/plain",
)
async def health(request: AnyRequest) -> Response[str]:
    """`ok`, for anybody who can connect; a problem otherwise."""
    await operations(request).store.revision()
    return Response(content="ok\n", media_type="text/plain", headers={"cache-control": "no-store"})


@get(
    "/metrics",
    operation_id="getMetrics",
    summary="Measurements for Prometheus",
    tags=["system"],
    media_type="text/plain",
    responses=errors(),
)
async def metrics(request: AnyRequest) -> Response[bytes]:
    """In Prometheus' text format: VMs, host, tasks, store and the API itself."""
    text = await render_metrics(
        operations(request), caller(request), request.app.state["statistics"]
    )
    return Response(content=text, media_type="text/plain; version=0.0.4")
