"""`tapeout serve`: checks what it can before the start, then runs the box until SIGTERM."""

import asyncio
import os
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click
import uvicorn

from app.cli.client import Refused
from app.cli.connection import Connection
from app.core import logs
from app.core.errors import AppError
from app.settings import Settings, SettingsError, read_settings

if TYPE_CHECKING:
    from litestar import Litestar

MIN_FREE_BYTES = 512 * 1024**2


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the box keeps everything.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(1, 65535), help="Port to listen on.  [default: 8080]")
def serve(data_dir: Path | None, host: str | None, port: int | None) -> None:
    """Run the box: migrate, start builds and workers, answer requests.

    Every setting can be given as a TAPEOUT_* variable; options win.
    """
    try:
        settings = read_settings(os.environ, data_dir=data_dir, host=host, port=port)
    except SettingsError as error:
        raise Refused("; ".join(error.problems)) from error
    check_machine(settings)
    logs.configure(settings.log_level, settings.log_format)
    from app.main import create_app  # here, so that other commands start without its libraries

    def announce(line: str) -> None:
        click.echo(logs.announcement(line, settings.log_format))

    app = create_app(settings, announce)
    server = Server(
        uvicorn.Config(
            app,
            http=Connection,
            host=settings.host,
            port=settings.port,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=settings.drain_seconds,
            server_header=False,
            lifespan="off",  # the server below runs it, to tell what stops the start
        ),
        app,
    )
    try:
        server.run()
    except ExceptionGroup as group:  # what is raised in an application's lifespan comes in one
        raise plain_refusal(group) from group
    if not server.started:
        raise SystemExit(1)


class Server(uvicorn.Server):
    """Runs the app from its start to its end, and exits with code 0 when it is told to: running
    requests finish, open pages are let go. A second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, app: "Litestar") -> None:
        super().__init__(config)
        self._app = app

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises what stops the app's start, in an `ExceptionGroup`."""
        with self.capture_signals():
            started = AsyncExitStack()
            await started.enter_async_context(self._app.lifespan())
            try:
                await super().serve(sockets)
            finally:
                if self.force_exit:
                    for task in asyncio.all_tasks() - {asyncio.current_task()}:
                        task.cancel()
                await started.aclose()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._app.state.broadcast.close()


def plain_refusal(group: "ExceptionGroup[Exception]") -> Exception:
    """One plain sentence where all that stopped the start is an error made for people; whatever
    else it is, as it is."""
    refusals, others = group.split(AppError)
    if refusals is None or others is not None:
        return group
    first: Exception = refusals
    while isinstance(first, ExceptionGroup):
        first = first.exceptions[0]
    return Refused(str(first))


def check_machine(settings: Settings) -> None:
    """Raises `Refused` with one plain sentence for what would stop the box from starting."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = settings.data_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Refused(f"cannot write to {settings.data_dir}: {error.strerror}.") from error
    disk = os.statvfs(settings.data_dir)
    if disk.f_bavail * disk.f_frsize < MIN_FREE_BYTES:
        raise Refused(f"less than 512 MB is free in {settings.data_dir}; make room first.")
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise Refused(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. "
                "Stop what uses it, or choose another with --port."
            ) from error
