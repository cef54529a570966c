"""`tapeout launcher`: the process that holds Docker's socket, for boxes that run in containers."""

import asyncio
import logging
import os
import signal
from pathlib import Path

import click

from app.cli.client import Refused
from app.core import logs
from app.deployments.launchers.engine import Engine, EngineError
from app.deployments.launchers.service import (
    LauncherService,
    engine_socket,
    find_surroundings,
)
from app.settings import SettingsError, read_settings

log = logging.getLogger(__name__)


@click.command()
@click.option(
    "--container", default="", help="This launcher's own container.  [default: the host name]"
)
def launcher(container: str) -> None:
    """Start and stop workers and builds as containers, for `tapeout serve` beside it.

    Reads TAPEOUT_DATA_DIR, TAPEOUT_LAUNCHER_SOCKET, TAPEOUT_LOG_LEVEL, TAPEOUT_LOG_FORMAT and
    DOCKER_HOST. It offers start, stop and status of one fixed form of container, and nothing else
    of Docker.
    """
    try:
        settings = read_settings(os.environ)
        logs.configure(settings.log_level, settings.log_format)
        asyncio.run(serve(settings.data_dir, settings.launcher_socket, container))
    except SettingsError as error:
        raise Refused("; ".join(error.problems)) from error
    except (EngineError, OSError) as error:
        raise Refused(f"{error}.") from error


async def serve(data_dir: Path, socket_path: Path, container: str) -> None:
    """Until SIGTERM; then every container that it started has ended."""
    engine = Engine(engine_socket())
    service = None
    try:
        surroundings = await find_surroundings(engine, data_dir, container)
        log.info("Docker %s; containers of the box %s", await engine.version(), surroundings.box)
        service = LauncherService(engine, surroundings)
        await service.start(socket_path)
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        await stopping.wait()
    finally:
        if service is not None:
            await service.close()
        await engine.close()
