"""Runs jobs from a queue in the database, each in a sandboxed process whose output is kept.

Owns what builds and optimisations have in common: the loops, one job from its claim to its end,
and how output becomes an artifact. What a job does is the subclass's.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, TypeVar

from sqlalchemy import select
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.broadcast import Broadcast
from app.core.clock import now
from app.core.database import Database
from app.core.errors import AppError
from app.core.ids import new_id
from app.core.storage import Storage
from app.deployments import artifacts
from app.deployments.acceptance import NotAcceptable
from app.deployments.artifacts import StoredFiles
from app.deployments.build_run import BuildError, Errand
from app.deployments.job_rows import JobRows, ProgressWriter, change_status, fail
from app.deployments.logs import LogFile, build_log_name
from app.registry.tables import Artifact, ModelVersion, Optimisation
from runtime.protocol import Progress

POLL_SECONDS = 1.0
RECORD_PAUSES_SECONDS = (1.0, 5.0, 15.0)

log = logging.getLogger(__name__)

Row = TypeVar("Row", ModelVersion, Optimisation)
# (session, id of the stored artifact or of one with the same content) -> None
Record = Callable[[AsyncSession, str], Awaitable[None]]


class Jobs(ABC, Generic[Row]):
    """Takes queued rows in order, `num_at_once` at a time: at once when `topic` is published, and
    within a second anyway."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        broadcast: Broadcast,
        *,
        rows: JobRows,
        errand: Errand,
        topic: str,
        num_at_once: int = 1,
    ) -> None:
        self._database = database
        self._storage = storage
        self._broadcast = broadcast
        self._rows = rows
        self._errand = errand
        self._topic = topic
        self._num_at_once = num_at_once
        self._is_closing = False
        self._loops: list[asyncio.Task[None]] = []
        self._running: dict[str, asyncio.Task[None]] = {}

    @abstractmethod
    async def _claim(self, session: AsyncSession) -> Row | None:
        """Takes the next queued row, if there is one whose turn it is."""

    @abstractmethod
    async def _make(self, row: Row, writer: ProgressWriter) -> None:
        """The job itself. Returns when the row says `ready` or `done`; raises why it does not."""

    @abstractmethod
    def _version_id(self, row: Row) -> str:
        """The version that the job is about: its log, and whom to tell."""

    # --- life -----------------------------------------------------------------------------

    def _begin(self) -> None:
        self._loops = [
            asyncio.create_task(self._loop(), name=f"{self._errand.code} {number}")
            for number in range(self._num_at_once)
        ]

    async def close(self) -> None:
        """Ends running jobs; they are queued again and begin anew at the next start."""
        self._is_closing = True
        for task in self._running.values():
            task.cancel()
        self._broadcast.publish(self._topic)
        if self._loops:
            _, late = await asyncio.wait(self._loops, timeout=15.0)
            for task in late:
                task.cancel()

    def _stop(self, row_id: str) -> None:
        """Ends a job whose row says already that it was cancelled."""
        task = self._running.get(row_id)
        if task is not None:
            task.cancel()

    # --- the queue ------------------------------------------------------------------------

    async def _loop(self) -> None:
        async for _ in self._broadcast.listen(self._topic, POLL_SECONDS):
            while not self._is_closing and (row := await self._next()) is not None:
                task = asyncio.create_task(self._work(row), name=f"{self._errand.code} {row.id}")
                self._running[row.id] = task
                await asyncio.wait([task])
                del self._running[row.id]
            if self._is_closing:
                return

    async def _next(self) -> Row | None:
        try:
            async with self._database.write() as session:
                return await self._claim(session)
        except SQLAlchemyError:
            log.exception("the queue could not be read; trying again")
            return None

    # --- one job --------------------------------------------------------------------------

    async def _work(self, row: Row) -> None:
        """Ends with the row done, failed, cancelled or queued again; raises only when cancelled."""
        self._publish(row)
        topic = f"version:{self._version_id(row)}"
        writer = ProgressWriter(self._database, self._broadcast, self._rows, row.id, topic)
        making = asyncio.create_task(self._make(row, writer))
        watching = asyncio.create_task(writer.run())
        try:
            await asyncio.wait([making, watching], return_when=asyncio.FIRST_COMPLETED)
            if not making.done():
                log.info("%s was cancelled", row.id)
        finally:
            for task in (making, watching):
                task.cancel()
            await asyncio.gather(making, watching, return_exceptions=True)
            await asyncio.shield(self._finish(row, making))

    async def _finish(self, row: Row, making: "asyncio.Task[None]") -> None:
        """Writes down how a job ended that did not succeed, and clears up after it."""
        try:
            if making.cancelled():
                self._note(row, f"[the {self._errand.noun} was stopped]")
                # Does nothing if the row says `cancelled`, or is gone.
                async with self._database.write() as session:
                    since = (self._rows.running,)
                    await change_status(session, self._rows, row.id, since=since, status="queued")
            elif (error := making.exception()) is not None:
                code, message = self._explanation(error)
                self._note(row, f"[failed: {message}]")
                await fail(self._database, self._rows, row.id, code, message)
        except SQLAlchemyError:  # the next start queues it again
            log.exception("the end of %s could not be written", row.id)
        await asyncio.to_thread(artifacts.remove, self._storage.build(row.id))
        self._publish(row)

    def _explanation(self, error: BaseException) -> tuple[str, str]:
        """(code, message) of a job that failed."""
        errand = self._errand
        if isinstance(error, BuildError | AppError):
            return error.code, error.message
        if isinstance(error, NotAcceptable):
            return (
                f"{errand.code}_not_acceptable",
                f"The {errand.noun}'s result was refused: {error}. {errand.again}; if that fails "
                "too, something in the upload disturbs it.",
            )
        if isinstance(error, OSError):
            return (
                "storage_error",
                f"The box could not store the result: {error.strerror or error}. Have the "
                f"operator look at the disk. {errand.again} then.",
            )
        log.error("a job failed unexpectedly", exc_info=error)
        return "internal_error", f"The box failed at this {errand.noun}. Its own log tells why."

    def _note(self, row: Row, text: str) -> None:
        log_file = LogFile(self._storage.log(build_log_name(self._version_id(row))))
        log_file.note(text)
        log_file.close()

    def _publish(self, row: Row) -> None:
        self._broadcast.publish(f"version:{self._version_id(row)}")

    # --- output ---------------------------------------------------------------------------

    async def _output_dir(self, row: Row) -> Path:
        """Empty, in the job's own directory."""
        build_dir = self._storage.build(row.id)
        await asyncio.to_thread(artifacts.remove, build_dir)
        output_dir = build_dir / "out"
        output_dir.mkdir(parents=True, mode=0o700)
        return output_dir

    async def _keep(self, output_dir: Path, writer: ProgressWriter, record: Record) -> StoredFiles:
        """Makes the output an artifact, if its content is new, and records the job's result with
        it. Nothing is left of an artifact that was not recorded."""
        writer.report(Progress(phase="store", fraction=1.0, detail="Hashing and storing."))
        artifact_id = new_id("art")
        files = await self._store(output_dir, artifact_id)
        try:
            is_used = await in_time(lambda: self._record(artifact_id, files, record))
        except BaseException:
            await asyncio.to_thread(artifacts.remove, self._storage.artifact(artifact_id))
            raise
        if not is_used:
            await asyncio.to_thread(artifacts.remove, self._storage.artifact(artifact_id))
        return files

    async def _store(self, output_dir: Path, artifact_id: str) -> StoredFiles:
        """In a thread, which a cancel waits for: it must not go on beside the clearing up."""
        artifact_dir = self._storage.artifact(artifact_id)
        storing = asyncio.ensure_future(
            asyncio.to_thread(artifacts.store, output_dir, artifact_dir)
        )
        try:
            return await asyncio.shield(storing)
        except asyncio.CancelledError:
            await asyncio.wait([storing])
            await asyncio.to_thread(artifacts.remove, artifact_dir)
            raise

    async def _record(self, artifact_id: str, files: StoredFiles, record: Record) -> bool:
        """One transaction. Returns whether the new files are used: not if the same content is
        stored already."""
        async with self._database.write() as session:
            known_id = await self._find_same(session, files.digest)
            if known_id is None:
                session.add(
                    Artifact(
                        id=artifact_id,
                        digest=files.digest,
                        size_bytes=files.size_bytes,
                        created_at=now(),
                    )
                )
                await session.flush()
            await record(session, known_id or artifact_id)
        return known_id is None

    async def _find_same(self, session: AsyncSession, digest: str) -> str | None:
        found = await session.execute(select(Artifact.id).where(Artifact.digest == digest))
        for artifact_id in found.scalars():
            if self._storage.artifact(artifact_id).is_dir():
                return artifact_id
        return None


T = TypeVar("T")


async def in_time(record: Callable[[], Awaitable[T]]) -> T:
    """A database that is busy for a moment is not worth a job."""
    for seconds in RECORD_PAUSES_SECONDS:
        try:
            return await record()
        except OperationalError as error:
            log.warning("a result could not be recorded yet: %s", error)
            await asyncio.sleep(seconds)
    return await record()
