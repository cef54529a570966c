"""Starts workers and builds as containers, through the launcher's process.

Owns the connections to that process, the sockets and the captured output. What a container looks
like is decided on the other side: see `template.py`.
"""

import asyncio
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from app.core.storage import Storage
from app.deployments.launchers.base import Exit, Launch, LaunchError, StreamProtocol
from app.deployments.launchers.orders import (
    MAX_LINE_BYTES,
    Done,
    Ended,
    Order,
    Output,
    Refused,
    Reply,
    Running,
    Start,
    Started,
    Status,
    Stop,
    decode_reply,
    encode,
)
from app.deployments.logs import LogFile

CONNECT_POLL_SECONDS = 0.02
START_SECONDS = 120.0
ANSWER_SECONDS = 10.0
KILL_SECONDS = 35.0  # Docker's own patience beyond the grace

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class DockerLauncher:
    """Starts containers beside the app's. `socket_path` is the launcher process's."""

    def __init__(self, storage: Storage, socket_path: Path) -> None:
        self._run_dir = storage.run_dir
        self._socket_path = socket_path
        self._processes: set[DockerProcess] = set()

    def clean(self) -> None:
        """The launcher has ended what an app that died had started."""
        current = {process.run_name for process in self._processes}
        for stale in self._run_dir.iterdir():
            if stale.name not in current:
                shutil.rmtree(stale, ignore_errors=True)

    async def status(self) -> Running:
        """Which containers run. Raises `LaunchError` when the launcher cannot be reached."""
        reply = await ask(self._socket_path, Status(), ANSWER_SECONDS)
        if not isinstance(reply, Running):
            raise LaunchError(f"The launcher answers {type(reply).__name__} to a status")
        return reply

    async def start(self, launch: Launch) -> "DockerProcess":
        name = secrets.token_hex(4)
        own_dir = self._run_dir / name
        (own_dir / "home").mkdir(parents=True, mode=0o700)
        order = Start(
            name=name,
            role=launch.role,
            num_threads=launch.num_threads,
            device=launch.device,
            memory_bytes=launch.memory_bytes,
            readable=[str(path) for path in launch.readable],
            writable=[str(path) for path in launch.writable],
        )
        try:
            reader, writer = await _order(self._socket_path, order)
            async with asyncio.timeout(START_SECONDS):
                reply = await _read(reader)
        except (LaunchError, TimeoutError) as error:
            shutil.rmtree(own_dir, ignore_errors=True)
            raise LaunchError(str(error) or "The launcher did not start a container") from error
        if not isinstance(reply, Started):
            writer.close()
            shutil.rmtree(own_dir, ignore_errors=True)
            reason = reply.message if isinstance(reply, Refused) else "no container started"
            raise LaunchError(f"The {launch.role} could not be started: {reason}")
        process = DockerProcess(launch, self._socket_path, own_dir, (reader, writer))
        self._processes.add(process)
        process.cleared.add_done_callback(lambda _: self._processes.discard(process))
        return process

    async def close(self) -> None:
        await asyncio.gather(*(process.stop(1.0) for process in list(self._processes)))


class DockerProcess:
    """A container, the connection on which its output and its end arrive, and its log."""

    def __init__(
        self, launch: Launch, launcher_path: Path, own_dir: Path, streams: Streams
    ) -> None:
        self._launch = launch
        self._launcher_path = launcher_path
        self._own_dir = own_dir
        self._socket_path = own_dir / "s"
        self._log = LogFile(launch.log_path)
        self._is_stopping = False
        self.run_name = own_dir.name
        self.name = f"container {own_dir.name}"
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self.cleared = loop.create_task(self._follow(*streams))

    def path(self, path: Path) -> str:
        """Everything is mounted where the app sees it."""
        return str(path)

    def note(self, text: str) -> None:
        self._log.note(text)

    async def connect(
        self, make_protocol: Callable[[], StreamProtocol], timeout_seconds: float
    ) -> StreamProtocol:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while not self.exited.done():
            try:
                _, protocol = await loop.create_unix_connection(
                    make_protocol, str(self._socket_path)
                )
            except (FileNotFoundError, ConnectionRefusedError):
                if loop.time() > deadline:
                    raise LaunchError(
                        f"The {self._launch.role} did not open its stream within "
                        f"{timeout_seconds:.0f} seconds"
                    ) from None
                await asyncio.sleep(CONNECT_POLL_SECONDS)
            except OSError as error:
                raise LaunchError(f"The {self._launch.role} cannot be reached: {error}") from error
            else:
                self._socket_path.unlink(missing_ok=True)  # it accepts no second connection
                return protocol
        raise LaunchError(f"The {self._launch.role} {self.exited.result().explain()}")

    async def stop(self, grace_seconds: float) -> Exit:
        self._is_stopping = True
        if not self.exited.done():
            order = Stop(name=self.run_name, grace_seconds=max(1, round(grace_seconds)))
            with suppress(LaunchError):  # then the end of its connection ends it
                reply = await ask(self._launcher_path, order, grace_seconds + KILL_SECONDS)
                assert isinstance(reply, Done | Refused)
        await asyncio.wait([self.cleared], timeout=KILL_SECONDS)
        if not self.cleared.done():
            self.cleared.cancel()
            await asyncio.wait([self.cleared])
        if not self.exited.done():
            self.exited.set_result(Exit(code=137, signal=9, is_stopped=True))
        return self.exited.result()

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = Ended(255, is_over_memory=False)
        try:
            while True:
                reply = await _read(reader)
                if isinstance(reply, Output):
                    await asyncio.to_thread(self._log.write, reply.data)
                elif isinstance(reply, Ended):
                    end = reply
                    break
                elif isinstance(reply, Refused):
                    self.note(f"[{reply.message}]")
                    break
        except LaunchError as error:
            self.note(f"[{error}]")
        finally:
            writer.close()
            if not self.exited.done():
                self.exited.set_result(self._exit(end))
            self._log.close()
            shutil.rmtree(self._own_dir, ignore_errors=True)

    def _exit(self, end: Ended) -> Exit:
        """Docker tells a signal's end as 128 and its number."""
        return Exit(
            code=end.code,
            signal=end.code - 128 if 128 < end.code < 160 else 0,
            is_stopped=self._is_stopping,
            is_over_memory=end.is_over_memory,
        )


async def ask(socket_path: Path, order: Order, timeout_seconds: float) -> Reply:
    """One order and its one reply. Raises `LaunchError`."""
    reader, writer = await _order(socket_path, order)
    try:
        async with asyncio.timeout(timeout_seconds):
            return await _read(reader)
    except TimeoutError:
        raise LaunchError("The launcher does not answer") from None
    finally:
        writer.close()


async def _order(socket_path: Path, order: Order) -> Streams:
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket_path), limit=MAX_LINE_BYTES)
        writer.write(encode(order))
        await writer.drain()
    except OSError as error:
        raise LaunchError(
            f"The launcher cannot be reached at {socket_path} ({error.strerror or error}); "
            "is its container running?"
        ) from error
    return reader, writer


async def _read(reader: asyncio.StreamReader) -> Reply:
    try:
        line = await reader.readline()
    except (ConnectionError, ValueError) as error:
        raise LaunchError(f"The launcher's connection broke: {error}") from error
    if not line:
        raise LaunchError("The launcher's connection ended")
    try:
        return decode_reply(line)
    except msgspec.DecodeError as error:
        raise LaunchError("The launcher answers in another version's words") from error
