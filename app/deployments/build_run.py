"""One run of a build process, from start to its result or the reason why there is none.

Owns the process's stream, time limit and end. What it is told to do, rows, files and deployment
are `builder.py`'s and `optimiser.py`'s.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from app.deployments.claims import failure_of
from app.deployments.launchers.base import Exit, Launch, Launcher, LaunchError, Process
from app.deployments.logs import clean_text, last_line
from app.deployments.stream import FrameStream
from runtime.protocol import (
    BuildFailed,
    Built,
    FrameError,
    FromBuild,
    Optimised,
    Progress,
    ToBuild,
)

CONNECT_SECONDS = 60.0
STOP_SECONDS = 3.0
MAX_PROGRESS_MESSAGES = 100_000
MAX_PHASE_CHARS = 40
MAX_DETAIL_CHARS = 500

Result = TypeVar("Result", Built, Optimised)


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is called where people read of it. `code` begins the codes of its errors."""

    noun: str
    code: str
    again: str  # what to do when a failure may pass
    less: str  # what to do when it needs too much
    timeout_setting: str


BUILD = Errand(
    noun="build",
    code="build",
    again="Build again",
    less="Upload a smaller model",
    timeout_setting="TAPEOUT_BUILD_TIMEOUT_SECONDS",
)
OPTIMISATION = Errand(
    noun="search for a faster form",
    code="optimise",
    again="Start it again",
    less="What was built serves on; stop other models",
    timeout_setting="TAPEOUT_OPTIMISE_TIMEOUT_SECONDS",
)


class BuildError(Exception):
    """The run failed; the message says in plain words why and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class BuildRun(Generic[Result]):
    """`message` makes what the process is told, and `result` is the answer that it then owes.
    `on_progress` is called with clean values whose fraction never falls."""

    def __init__(
        self,
        launcher: Launcher,
        launch: Launch,
        *,
        errand: Errand,
        message: Callable[[Process], ToBuild],
        result: type[Result],
        timeout_seconds: float,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._launcher = launcher
        self._launch = launch
        self._errand = errand
        self._message = message
        self._expected = result
        self._timeout_seconds = timeout_seconds
        self._on_progress = on_progress
        self._result: asyncio.Future[Result | BuildFailed | str] = (
            asyncio.get_running_loop().create_future()
        )
        self._last = Progress(phase="start", fraction=0.0)
        self._num_messages = 0

    async def run(self) -> Result:
        """Raises `BuildError`. When cancelled it ends the process first."""
        errand = self._errand
        try:
            process = await self._launcher.start(self._launch)
        except LaunchError as error:
            raise BuildError(f"{errand.code}_not_started", f"{error}. {errand.again}.") from error
        decoder = msgspec.msgpack.Decoder(FromBuild)
        stream: FrameStream[FromBuild] = FrameStream(decoder, self._receive, self._on_lost)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await process.connect(lambda: stream, CONNECT_SECONDS)
                stream.send(self._message(process))
                await asyncio.wait(
                    [self._result, process.exited], return_when=asyncio.FIRST_COMPLETED
                )
                return await self._conclude(process)
        except TimeoutError:
            raise BuildError(
                f"{errand.code}_timeout",
                f"The {errand.noun} took longer than {self._timeout_seconds:,.0f} seconds (it was "
                f"in {self._last.phase!r}). {errand.less}, or have the operator raise "
                f"{errand.timeout_setting}.",
            ) from None
        except LaunchError:
            raise await self._unexpected_end(process, None) from None
        finally:
            stream.close("is over")
            await process.stop(STOP_SECONDS)

    async def _conclude(self, process: Process) -> Result:
        if not self._result.done():
            # The process has ended; what it sent last may still be in the socket.
            await asyncio.wait([self._result], timeout=1.0)
        result = self._result.result() if self._result.done() else None
        if isinstance(result, self._expected):
            return result
        if isinstance(result, BuildFailed):
            failure = failure_of(result.error)
            raise BuildError(failure.code or f"{self._errand.code}_failed", failure.message)
        assert not isinstance(result, Built | Optimised), "only what was asked for is taken"
        raise await self._unexpected_end(process, result)

    async def _unexpected_end(self, process: Process, reason: str | None) -> BuildError:
        await asyncio.wait([process.exited], timeout=1.0)
        ended = process.exited.result() if process.exited.done() else None
        errand = self._errand
        if ended is None:
            return BuildError(
                f"{errand.code}_protocol_error",
                f"The {errand.noun} {reason or 'could not be reached'} and was stopped. "
                f"{errand.again}; if that fails too, something in the upload disturbs it.",
            )
        words = await asyncio.to_thread(last_line, self._launch.log_path)
        said = f" It last said: {words}" if words else ""
        where = f" while in {self._last.phase!r}" if self._num_messages else ""
        problem = "out_of_memory" if _is_about_memory(ended) else "crashed"
        return BuildError(
            f"{errand.code}_{problem}",
            f"The {errand.noun} {ended.explain()}{where}. {self._advice(ended)}{said}",
        )

    def _advice(self, ended: Exit) -> str:
        errand = self._errand
        if ended.is_over_memory:
            return (
                f"The limit is {self._launch.memory_bytes:,} bytes. {errand.less}, or have the "
                "operator raise TAPEOUT_BUILD_MEMORY."
            )
        if _is_about_memory(ended):
            return f"{errand.less}, stop other models, or give the machine more memory."
        return f"Its log tells more. {errand.again} once the cause is mended."

    # --- the stream -----------------------------------------------------------------------

    def _receive(self, message: FromBuild) -> None:
        if self._result.done():
            return
        if isinstance(message, self._expected | BuildFailed):
            self._result.set_result(message)
            return
        if not isinstance(message, Progress):
            raise FrameError("an answer to what was not asked")
        self._num_messages += 1
        if self._num_messages > MAX_PROGRESS_MESSAGES or not math.isfinite(message.fraction):
            raise FrameError("progress without end or meaning")
        self._last = Progress(
            phase=_one_line(message.phase, MAX_PHASE_CHARS),
            fraction=min(1.0, max(self._last.fraction, message.fraction)),
            detail=_one_line(message.detail, MAX_DETAIL_CHARS),
        )
        self._on_progress(self._last)

    def _on_lost(self, reason: str) -> None:
        if not self._result.done():
            self._result.set_result(reason)


def _one_line(text: str, max_chars: int) -> str:
    return clean_text(text, max_chars).replace("\n", " ")


def _is_about_memory(ended: Exit) -> bool:
    return ended.is_over_memory or "out of memory" in ended.explain()
