"""The daemon: data directory, store, host agent and API put together, from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

import structlog

from undercroft.host.acceleration import HostAcceleration
from undercroft.host.agent import HostAgent
from undercroft.host.environment import Environment
from undercroft.host.registration import keep_described, register
from undercroft.host.warming import Room
from undercroft.operations.context import Context
from undercroft.operations.core import Operations
from undercroft.store.datadir import DataDirectory
from undercroft.store.sqlite import SQLiteStore

log = structlog.get_logger("undercroft.daemon")


def run_daemon(data: Path, listen: str | None = None) -> None:
    """Runs the daemon until a signal ends it. VMs run on.

    Raises:
        UndercroftError: it cannot start.
    """
    _configure_log()
    directory = DataDirectory.open(data)
    directory.lock()
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(directory, listen))
    finally:
        directory.unlock()


async def serve(directory: DataDirectory, listen: str | None) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        UndercroftError: the store cannot be opened, or an address cannot be listened on.
    """
    began = time.monotonic()
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    async with contextlib.AsyncExitStack() as stack:
        store = await SQLiteStore.open(directory.store_file)
        stack.push_async_callback(store.close)
        acceleration = HostAcceleration(directory.cache)
        acceleration.begin()
        stack.push_async_callback(acceleration.close)
        room = Room.read(os.environ.get("CROFT_WARM"))
        environment = Environment(
            store=store,
            host=await register(store, time.time()),
            directory=directory,
            accelerator=acceleration.choose,
        )
        agent = HostAgent(environment, room)
        await agent.start()
        stack.push_async_callback(agent.close)
        describing = asyncio.create_task(keep_described(environment, acceleration))
        stack.callback(describing.cancel)
        operations = Operations(
            Context(store=store, host=environment.host, services=agent.services)
        )
        from undercroft.api.server import ApiServer

        server = ApiServer(operations, directory, listen)
        await server.start()
        stack.push_async_callback(server.stop)
        log.info(
            "ready",
            data=str(directory.path),
            pid=os.getpid(),
            milliseconds=round((time.monotonic() - began) * 1000),
        )
        await ending.wait()
        log.info("ending; VMs run on")


def _configure_log() -> None:
    """One line an entry, to stderr, which is DATA/daemon.log where `croft` started the daemon."""
    level = getattr(logging, os.environ.get("CROFT_LOG", "info").upper(), logging.INFO)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(
                key_order=["timestamp", "level", "event"], drop_missing=True
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
