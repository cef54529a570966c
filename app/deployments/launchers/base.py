"""What the control plane asks of whatever starts worker and build processes.

A launcher owns the process: its environment, the paths it sees, its captured output and its end.
What is said over its stream is the business of `link.py` and `builder.py`.
"""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import msgspec

StreamProtocol = TypeVar("StreamProtocol", bound=asyncio.Protocol)


class LaunchError(Exception):
    """A process could not be started or reached. The message says why, in plain words."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What to start. `readable` and `writable` are all that it may be given of the data
    directory; `memory_bytes` 0 means no limit. `niceness` is how far a build stands back from
    what serves (0 to 19)."""

    role: Literal["worker", "build"]
    log_path: Path
    num_threads: int
    device: str = "cpu"
    readable: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    memory_bytes: int = 0
    niceness: int = 10


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended: by `code`, or by `signal` (0 when it was not one). `is_stopped`: we
    ended it. `is_over_memory`: its memory limit did."""

    code: int
    signal: int = 0
    is_stopped: bool = False
    is_over_memory: bool = False

    def explain(self) -> str:
        """The end in plain words, to follow `The build` or `The worker`."""
        if self.is_over_memory:
            return "needed more memory than its limit allows"
        if self.is_stopped:
            return "was stopped"
        if self.signal:
            return _SIGNALS.get(self.signal) or f"was ended by signal {self.signal}"
        if self.code:
            return f"ended unexpectedly with exit code {self.code}"
        return "ended without an answer"


_SIGNALS: dict[int, str] = {
    signal.SIGKILL: "was killed, most likely because the machine ran out of memory",
    signal.SIGSEGV: "crashed (segmentation fault)",
    signal.SIGBUS: "crashed (bus error: a file or shared memory shrank, or the disk is full)",
    signal.SIGABRT: "crashed (aborted by a library it uses)",
    signal.SIGFPE: "crashed (arithmetic error)",
    signal.SIGILL: "crashed (this CPU lacks an instruction it uses)",
    signal.SIGSYS: "tried something that its sandbox forbids",
    signal.SIGXCPU: "used up its CPU time",
    signal.SIGXFSZ: "tried to write a file larger than its sandbox allows",
    signal.SIGTERM: "was told to stop by something outside Tapeout",
    signal.SIGHUP: "was told to stop by something outside Tapeout",
    signal.SIGINT: "was interrupted",
}


class Process(Protocol):
    """One started worker or build. It is alive until `exited` is set."""

    name: str  # what people find it by on the machine, such as `pid 1234`

    @property
    def exited(self) -> "asyncio.Future[Exit]":
        """Resolved when the process has ended, whoever ended it. Await it shielded."""
        ...

    def path(self, path: Path) -> str:
        """`path`, one of those it was started with, as the process sees it."""
        ...

    async def connect(
        self, make_protocol: Callable[[], StreamProtocol], timeout_seconds: float
    ) -> StreamProtocol:
        """Opens the one stream to the process. Raises `LaunchError` if it ends or stays silent."""
        ...

    def note(self, text: str) -> None:
        """Adds a line of ours to the process's log."""
        ...

    async def stop(self, grace_seconds: float) -> Exit:
        """Asks the process to end, ends it and everything it started after `grace_seconds`, and
        removes what it was given. Idempotent; returns in bounded time."""
        ...


class Launcher(Protocol):
    """Starts processes. `close` ends those that are left."""

    def clean(self) -> None:
        """Removes what an app that died left behind. Called before anything is started."""
        ...

    async def start(self, launch: Launch) -> Process:
        """Raises `LaunchError`."""
        ...

    async def close(self) -> None: ...
