"""The launcher's process: the only one that holds Docker's socket. It starts, stops and tells.

Owns the connections of the app and the lives of containers. A container whose connection ends is
ended with it, so that an app that dies leaves nothing running.
"""

import asyncio
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

import msgspec

from app.deployments.launchers.engine import Engine, EngineError
from app.deployments.launchers.local import child_environment
from app.deployments.launchers.orders import (
    MAX_LINE_BYTES,
    Done,
    Ended,
    Order,
    OrderError,
    Output,
    Refused,
    Reply,
    Running,
    Start,
    Started,
    Stop,
    check_name,
    check_start,
    decode_order,
    encode,
)
from app.deployments.launchers.template import (
    LABEL,
    Surroundings,
    container_body,
    container_name,
    run_dir,
)

ORDER_SECONDS = 10.0  # an app that connects says at once what it wants
MAX_GRACE_SECONDS = 600

log = logging.getLogger(__name__)


async def find_surroundings(engine: Engine, data_dir: Path, container: str = "") -> Surroundings:
    """From the launcher's own container: its image, and the mount that is the data directory.
    Raises `EngineError`."""
    own = await engine.inspect(container or socket.gethostname())
    mount = next((m for m in own["Mounts"] if m["Destination"] == str(data_dir)), None)
    if mount is None:
        raise EngineError(
            f"The launcher's container has nothing mounted at {data_dir}; mount the data volume "
            "there, as compose.yaml does"
        )
    return Surroundings(
        image=own["Image"],
        data_dir=str(data_dir),
        host_data_dir=mount["Source"],
        box=str(own["Config"]["Labels"].get("com.docker.compose.project", "box")),
    )


class LauncherService:
    """Serves orders on a socket of the file system until it is closed."""

    def __init__(self, engine: Engine, surroundings: Surroundings) -> None:
        self._engine = engine
        self._surroundings = surroundings
        self._server: asyncio.Server | None = None

    async def start(self, socket_path: Path) -> None:
        """Ends what an earlier launcher left, then listens."""
        for left in await self._engine.list(self._surroundings.box):
            await self._engine.remove(left["Id"])
        await asyncio.to_thread(_make_room, socket_path)
        self._server = await asyncio.start_unix_server(
            self._serve, str(socket_path), limit=MAX_LINE_BYTES
        )
        # Its directory is a volume of the app and the launcher alone.
        os.chmod(socket_path, 0o666)  # noqa: S103

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for left in await self._engine.list(self._surroundings.box):
            await self._engine.remove(left["Id"])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(ORDER_SECONDS):
                order = decode_order(await reader.readline())
            await self._carry_out(order, reader, writer)
        except (OrderError, EngineError) as error:
            await _say(writer, Refused(str(error)))
        except (msgspec.DecodeError, ValueError):
            await _say(writer, Refused("The launcher does not know this order."))
        except (TimeoutError, ConnectionError):
            pass  # nobody is there
        except Exception:
            log.exception("an order failed")
            await _say(writer, Refused("The launcher failed; its log says why."))
        finally:
            writer.close()

    async def _carry_out(
        self, order: Order, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if isinstance(order, Start):
            check_start(order, Path(self._surroundings.data_dir))
            await self._run(order, reader, writer)
        elif isinstance(order, Stop):
            check_name(order.name)
            grace = max(0, min(order.grace_seconds, MAX_GRACE_SECONDS))
            await self._engine.stop(container_name(order.name, self._surroundings), grace)
            await _say(writer, Done())
        else:
            await _say(writer, await self._running())

    async def _running(self) -> Running:
        try:
            containers = await self._engine.list(self._surroundings.box)
        except EngineError as error:
            return Running([], str(error))
        name = f"{LABEL}.name"
        return Running([c["Labels"][name] for c in containers if c["State"] == "running"])

    async def _run(
        self, order: Start, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """From its creation to its removal. The app hears what it prints and how it ended."""
        name = container_name(order.name, self._surroundings)
        home = Path(run_dir(order, self._surroundings), "home")
        environment = child_environment(order.num_threads, order.device, home, os.environ)
        body = container_body(order, environment, self._surroundings)
        container = await self._engine.create(name, body)
        gone = asyncio.create_task(_left(reader))
        try:
            await self._engine.start(container)
            await _say(writer, Started(order.name))
            following = asyncio.create_task(self._follow(container, writer))
            await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
        finally:
            gone.cancel()
            await self._engine.remove(container)

    async def _follow(self, container: str, writer: asyncio.StreamWriter) -> None:
        async for data in self._engine.output(container):
            await _say(writer, Output(data))
        code = await self._engine.wait(container)
        state = (await self._engine.inspect(container))["State"]
        await _say(writer, Ended(code, bool(state["OOMKilled"])))


def _make_room(socket_path: Path) -> None:
    socket_path.parent.mkdir(parents=True, exist_ok=True)
    socket_path.unlink(missing_ok=True)


async def _left(reader: asyncio.StreamReader) -> None:
    """Returns when the app has closed its end."""
    with suppress(ConnectionError):
        while await reader.read(4096):
            pass


async def _say(writer: asyncio.StreamWriter, reply: Reply) -> None:
    with suppress(ConnectionError):
        writer.write(encode(reply))
        await writer.drain()


def engine_socket() -> Path:
    return Path(
        os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
    )
