"""One run of a build process, from start to its result or the reason why there is none.

Owns the process's stream, time limit and end. Rows, files and deployment are `builder.py`'s.
"""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import msgspec

from app.deployments.claims import failure_of
from app.deployments.launchers.base import Exit, Launch, Launcher, LaunchError, Process
from app.deployments.logs import clean_text, last_line
from app.deployments.stream import FrameStream
from runtime.protocol import (
    Build,
    BuildFailed,
    BuildHints,
    Built,
    FrameError,
    FromBuild,
    Optimised,
    Progress,
)

CONNECT_SECONDS = 60.0
STOP_SECONDS = 3.0
MAX_PROGRESS_MESSAGES = 100_000
MAX_PHASE_CHARS = 40
MAX_DETAIL_CHARS = 500


class BuildError(Exception):
    """The build failed; the message says in plain words why and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class BuildRun:
    """`on_progress` is called with clean values whose fraction never falls."""

    def __init__(
        self,
        launcher: Launcher,
        launch: Launch,
        *,
        upload_path: Path,
        output_dir: Path,
        timeout_seconds: float,
        on_progress: Callable[[Progress], None],
        hints: BuildHints = BuildHints(),  # noqa: B008 -- immutable
    ) -> None:
        self._launcher = launcher
        self._launch = launch
        self._upload_path = upload_path
        self._output_dir = output_dir
        self._timeout_seconds = timeout_seconds
        self._on_progress = on_progress
        self._hints = hints
        self._result: asyncio.Future[Built | BuildFailed | str] = (
            asyncio.get_running_loop().create_future()
        )
        self._last = Progress(phase="start", fraction=0.0)
        self._num_messages = 0

    async def run(self) -> Built:
        """Raises `BuildError`. When cancelled it ends the process first."""
        try:
            process = await self._launcher.start(self._launch)
        except LaunchError as error:
            raise BuildError("build_not_started", f"{error}. Build again.") from error
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
                "build_timeout",
                f"The build took longer than {self._timeout_seconds:,.0f} seconds (it was in "
                f"{self._last.phase!r}). Upload a smaller model, or have the operator raise "
                "TAPEOUT_BUILD_TIMEOUT_SECONDS.",
            ) from None
        except LaunchError:
            raise await self._unexpected_end(process, None) from None
        finally:
            stream.close("is over")
            await process.stop(STOP_SECONDS)

    def _message(self, process: Process) -> Build:
        return Build(
            upload_path=process.path(self._upload_path),
            output_dir=process.path(self._output_dir),
            num_threads=self._launch.num_threads,
            hints=self._hints,
        )

    async def _conclude(self, process: Process) -> Built:
        if not self._result.done():
            # The process has ended; what it sent last may still be in the socket.
            await asyncio.wait([self._result], timeout=1.0)
        result = self._result.result() if self._result.done() else None
        if isinstance(result, Built):
            return result
        if isinstance(result, BuildFailed):
            failure = failure_of(result.error)
            raise BuildError(failure.code or "build_failed", failure.message)
        raise await self._unexpected_end(process, result)

    async def _unexpected_end(self, process: Process, reason: str | None) -> BuildError:
        await asyncio.wait([process.exited], timeout=1.0)
        ended = process.exited.result() if process.exited.done() else None
        if ended is None:
            return BuildError(
                "build_protocol_error",
                f"The build {reason or 'could not be reached'} and was stopped. Build again; if "
                "that fails too, something in the upload disturbs it.",
            )
        words = await asyncio.to_thread(last_line, self._launch.log_path)
        said = f" It last said: {words}" if words else ""
        where = f" while in {self._last.phase!r}" if self._num_messages else ""
        return BuildError(
            "build_out_of_memory" if _is_about_memory(ended) else "build_crashed",
            f"The build {ended.explain()}{where}. {_advice(ended, self._launch)}{said}",
        )

    # --- the stream -----------------------------------------------------------------------

    def _receive(self, message: FromBuild) -> None:
        if self._result.done():
            return
        if isinstance(message, Optimised):
            raise FrameError("an answer to what was not asked")
        if not isinstance(message, Progress):
            self._result.set_result(message)
            return
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


def _advice(ended: Exit, launch: Launch) -> str:
    if ended.is_over_memory:
        return (
            f"The limit is {launch.memory_bytes:,} bytes. Upload a smaller model, or have the "
            "operator raise TAPEOUT_BUILD_MEMORY."
        )
    if _is_about_memory(ended):
        return "Upload a smaller model, stop other models, or give the machine more memory."
    return "Its log tells more; build again once the cause is mended."
