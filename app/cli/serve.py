"""`tapeout serve`: checks what it can before the start, then runs the box until SIGTERM."""

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import click
import uvicorn

from app.cli.client import Refused
from app.settings import Settings, SettingsError, read_settings

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
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)-7s %(name)s  %(message)s"
    )
    for noisy in ("alembic", "httpx", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from app.main import create_app  # here, so that other commands start without its libraries

    app = create_app(settings, announce=click.echo)
    server = Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=settings.drain_seconds,
            server_header=False,
        ),
        on_exit=app.state.broadcast.close,
    )
    server.run()
    if not server.started:
        raise SystemExit(1)


class Server(uvicorn.Server):
    """Ends with exit code 0 when it is told to: running requests finish, open pages are let go.
    A second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._on_exit()


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
