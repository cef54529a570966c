"""Builds queued versions: one process each, then artifact, row and deployment.

Owns the queue and what becomes of a build's result. The process is `build_run.py`'s, the row
while it runs `build_rows.py`'s, the files `artifacts.py`'s.
"""

import asyncio
import logging
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.broadcast import Broadcast
from app.core.clock import now
from app.core.database import Database
from app.core.errors import AppError, Conflict
from app.core.ids import new_id
from app.core.storage import Storage
from app.deployments import artifacts
from app.deployments.acceptance import NotAcceptable, check_built, manifest_json, receipt_json
from app.deployments.artifacts import StoredFiles
from app.deployments.build_rows import (
    ProgressWriter,
    change_status,
    claim,
    fail,
    has_newer_ready,
    requeue_interrupted,
)
from app.deployments.build_run import BuildError, BuildRun
from app.deployments.launchers.base import Launch, Launcher
from app.deployments.logs import LogFile, build_log_name
from app.deployments.service import CHANGED, deploy_version
from app.registry.service import BUILDS_TOPIC, version_hints
from app.registry.tables import Artifact, ModelVersion
from app.settings import Settings
from runtime.protocol import Built, Progress

POLL_SECONDS = 1.0
RECORD_PAUSES_SECONDS = (1.0, 5.0, 15.0)
SPACE_FACTOR = 3  # a build unpacks the upload and writes an artifact of about its size

log = logging.getLogger(__name__)


class Builder:
    """Takes queued versions in order, `num_at_once` at a time: at once when `BUILDS_TOPIC` is
    published, and within a second anyway."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        launcher: Launcher,
        broadcast: Broadcast,
        settings: Settings,
        *,
        num_at_once: int = 1,
    ) -> None:
        self._database = database
        self._storage = storage
        self._launcher = launcher
        self._broadcast = broadcast
        self._settings = settings
        self._num_at_once = num_at_once
        self._is_closing = False
        self._loops: list[asyncio.Task[None]] = []
        self._running: dict[str, asyncio.Task[None]] = {}

    # --- life -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Queues again what a dead app was building, removes what it left, and begins."""
        async with self._database.write() as session:
            await requeue_interrupted(session)
            known = set((await session.execute(select(Artifact.id))).scalars())
        data_dir = self._storage.data_dir
        await asyncio.to_thread(artifacts.remove_unknown, data_dir / "builds", set())
        await asyncio.to_thread(artifacts.remove_unknown, data_dir / "artifacts", known)
        self._loops = [
            asyncio.create_task(self._loop(), name=f"builder {number}")
            for number in range(self._num_at_once)
        ]

    async def close(self) -> None:
        """Ends running builds; they are queued again and begin anew at the next start."""
        self._is_closing = True
        for task in self._running.values():
            task.cancel()
        self._broadcast.publish(BUILDS_TOPIC)
        if self._loops:
            _, late = await asyncio.wait(self._loops, timeout=15.0)
            for task in late:
                task.cancel()

    async def cancel(self, version_id: str) -> None:
        """Takes a version off the queue or ends its build. Raises `Conflict` if it is over."""
        async with self._database.write() as session:
            is_cancelled = await change_status(
                session,
                version_id,
                since=("queued", "building"),
                status="cancelled",
                error_code="cancelled",
                error_message="The build was cancelled.",
                finished_at=now(),
            )
        if not is_cancelled:
            raise Conflict("This version is not being built any more.", code="not_building")
        task = self._running.get(version_id)
        if task is not None:
            task.cancel()
        self._publish(version_id)

    # --- the queue ------------------------------------------------------------------------

    async def _loop(self) -> None:
        async for _ in self._broadcast.listen(BUILDS_TOPIC, POLL_SECONDS):
            while not self._is_closing and (version := await self._claim()) is not None:
                task = asyncio.create_task(self._build(version), name=f"build {version.id}")
                self._running[version.id] = task
                await asyncio.wait([task])
                del self._running[version.id]
            if self._is_closing:
                return

    async def _claim(self) -> ModelVersion | None:
        try:
            async with self._database.write() as session:
                return await claim(session)
        except SQLAlchemyError:
            log.exception("the build queue could not be read; trying again")
            return None

    # --- one build ------------------------------------------------------------------------

    async def _build(self, version: ModelVersion) -> None:
        """Ends with the version ready, failed, cancelled or queued again; raises only when
        cancelled."""
        self._publish(version.id)
        writer = ProgressWriter(self._database, self._broadcast, version.id)
        building = asyncio.create_task(self._make(version, writer))
        watching = asyncio.create_task(writer.run())
        try:
            await asyncio.wait([building, watching], return_when=asyncio.FIRST_COMPLETED)
            if not building.done():
                log.info("the build of %s was cancelled", version.id)
        finally:
            for task in (building, watching):
                task.cancel()
            await asyncio.gather(building, watching, return_exceptions=True)
            await asyncio.shield(self._finish(version, building))

    async def _finish(self, version: ModelVersion, building: "asyncio.Task[None]") -> None:
        """Writes down how a build ended that did not become ready, and clears up after it."""
        try:
            if building.cancelled():
                self._note(version, "[the build was stopped]")
                # Does nothing if the row says `cancelled`, or is gone.
                async with self._database.write() as session:
                    await change_status(session, version.id, since=("building",), status="queued")
            elif (error := building.exception()) is not None:
                code, message = _explanation(error)
                self._note(version, f"[failed: {message}]")
                await fail(self._database, version.id, code, message)
        except SQLAlchemyError:  # the next start queues it again
            log.exception("the end of the build of %s could not be written", version.id)
        await asyncio.to_thread(artifacts.remove, self._storage.build(version.id))
        self._publish(version.id)

    async def _make(self, version: ModelVersion, writer: ProgressWriter) -> None:
        upload_path = self._storage.upload(version.upload_id)
        if not await asyncio.to_thread(upload_path.is_file):
            raise BuildError("upload_missing", "The uploaded file is gone. Upload it again.")
        self._storage.require_space(SPACE_FACTOR * version.upload_bytes)
        build_dir = self._storage.build(version.id)
        output_dir = build_dir / "out"
        await asyncio.to_thread(artifacts.remove, build_dir)
        output_dir.mkdir(parents=True, mode=0o700)
        built = await self._run(version, writer, output_dir)
        check_built(built)
        writer.report(Progress(phase="store", fraction=1.0, detail="Hashing and storing."))
        artifact_id = new_id("art")
        files = await self._store(output_dir, artifact_id)
        try:
            is_used = await self._record_in_time(version, built, artifact_id, files)
        except BaseException:
            await asyncio.to_thread(artifacts.remove, self._storage.artifact(artifact_id))
            raise
        if not is_used:
            await asyncio.to_thread(artifacts.remove, self._storage.artifact(artifact_id))
        self._note(version, f"[ready: {files.num_files} files, {files.size_bytes:,} bytes]")
        self._broadcast.publish(CHANGED)

    async def _run(self, version: ModelVersion, writer: ProgressWriter, output_dir: Path) -> Built:
        settings = self._settings
        upload_path = self._storage.upload(version.upload_id)
        launch = Launch(
            role="build",
            log_path=self._storage.log(build_log_name(version.id)),
            num_threads=settings.threads_per_build,
            device=settings.device,
            readable=(upload_path,),
            writable=(output_dir,),
            memory_bytes=settings.build_memory_bytes,
        )
        run = BuildRun(
            self._launcher,
            launch,
            upload_path=upload_path,
            output_dir=output_dir,
            timeout_seconds=settings.build_timeout_seconds,
            on_progress=writer.report,
            hints=version_hints(version),
        )
        return await run.run()

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

    async def _record_in_time(
        self, version: ModelVersion, built: Built, artifact_id: str, files: StoredFiles
    ) -> bool:
        """As `_record`. A database that is busy for a moment is not worth a build."""
        for seconds in RECORD_PAUSES_SECONDS:
            try:
                return await self._record(version, built, artifact_id, files)
            except OperationalError as error:
                log.warning("the result of %s could not be recorded yet: %s", version.id, error)
                await asyncio.sleep(seconds)
        return await self._record(version, built, artifact_id, files)

    async def _record(
        self, version: ModelVersion, built: Built, artifact_id: str, files: StoredFiles
    ) -> bool:
        """Artifact, version and deployment in one transaction. Returns whether the new files are
        used: not if the same content is stored already, or the version was cancelled."""
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
            is_ready = await change_status(
                session,
                version.id,
                since=("building",),
                status="ready",
                phase="done",
                phase_detail="",
                progress_permille=1000,
                artifact_id=known_id or artifact_id,
                manifest=manifest_json(built.manifest),
                receipt=receipt_json(built.receipt),
                finished_at=now(),
            )
            if not is_ready:
                raise asyncio.CancelledError
            ready = await session.get_one(ModelVersion, version.id, populate_existing=True)
            if not await has_newer_ready(session, ready):
                await deploy_version(session, ready)
        return known_id is None

    async def _find_same(self, session: AsyncSession, digest: str) -> str | None:
        found = await session.execute(select(Artifact.id).where(Artifact.digest == digest))
        for artifact_id in found.scalars():
            if self._storage.artifact(artifact_id).is_dir():
                return artifact_id
        return None

    def _note(self, version: ModelVersion, text: str) -> None:
        log_file = LogFile(self._storage.log(build_log_name(version.id)))
        log_file.note(text)
        log_file.close()

    def _publish(self, version_id: str) -> None:
        self._broadcast.publish(f"version:{version_id}")


def _explanation(error: BaseException) -> tuple[str, str]:
    """(code, message) of a version that failed."""
    if isinstance(error, BuildError):
        return error.code, error.message
    if isinstance(error, AppError):
        return error.code, error.message
    if isinstance(error, NotAcceptable):
        return (
            "build_not_acceptable",
            f"The build's result was refused: {error}. Build again; if that fails too, something "
            "in the upload disturbs it.",
        )
    if isinstance(error, OSError):
        return (
            "storage_error",
            f"The box could not store the result: {error.strerror or error}. Have the operator "
            "look at the disk, then build again.",
        )
    log.error("a build failed unexpectedly", exc_info=error)
    return "internal_error", "The box failed to build this version. Its own log tells why."
