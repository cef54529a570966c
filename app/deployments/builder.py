"""Builds queued versions: one process each, then artifact, row and deployment.

Owns what a build is given and what becomes of its result. The queue is `jobs.py`'s, the process
`build_run.py`'s, the files `artifacts.py`'s.
"""

import asyncio
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.broadcast import Broadcast
from app.core.clock import now
from app.core.database import Database
from app.core.errors import Conflict
from app.core.storage import Storage
from app.deployments import artifacts, job_rows
from app.deployments.acceptance import check_built, manifest_json, receipt_json
from app.deployments.build_run import BUILD, BuildError, BuildRun
from app.deployments.job_rows import BUILDS, ProgressWriter, change_status
from app.deployments.jobs import Jobs
from app.deployments.launchers.base import Launch, Launcher, Process
from app.deployments.logs import build_log_name
from app.deployments.optimisation_rows import OPTIMISATIONS_TOPIC, enqueue, is_optimisable
from app.deployments.service import CHANGED, deploy_version
from app.registry.service import BUILDS_TOPIC, version_hints
from app.registry.tables import Artifact, ModelVersion
from app.settings import Settings
from runtime.protocol import Build, Built

SPACE_FACTOR = 3  # a build unpacks the upload and writes an artifact of about its size


class Builder(Jobs[ModelVersion]):
    """Takes queued versions in order, `num_at_once` at a time."""

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
        super().__init__(
            database,
            storage,
            broadcast,
            rows=BUILDS,
            errand=BUILD,
            topic=BUILDS_TOPIC,
            num_at_once=num_at_once,
        )
        self._launcher = launcher
        self._settings = settings

    async def start(self) -> None:
        """Queues again what a dead app was building, removes what it left, and begins."""
        async with self._database.write() as session:
            await job_rows.requeue_interrupted(session, BUILDS)
            known = set((await session.execute(select(Artifact.id))).scalars())
        data_dir = self._storage.data_dir
        await asyncio.to_thread(artifacts.remove_unknown, data_dir / "builds", set())
        await asyncio.to_thread(artifacts.remove_unknown, data_dir / "artifacts", known)
        self._begin()

    async def cancel(self, version_id: str) -> None:
        """Takes a version off the queue or ends its build. Raises `Conflict` if it is over."""
        async with self._database.write() as session:
            message = "The build was cancelled."
            is_cancelled = await job_rows.cancel(session, BUILDS, version_id, message)
        if not is_cancelled:
            raise Conflict("This version is not being built any more.", code="not_building")
        self._stop(version_id)
        self._broadcast.publish(f"version:{version_id}")

    def _version_id(self, row: ModelVersion) -> str:
        return row.id

    async def _claim(self, session: AsyncSession) -> ModelVersion | None:
        oldest = (
            select(ModelVersion)
            .where(ModelVersion.status == "queued")
            .order_by(ModelVersion.created_at, ModelVersion.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        version = (await session.execute(oldest)).scalar_one_or_none()
        if version is not None:
            job_rows.begin(version, BUILDS)
        return version

    async def _make(self, row: ModelVersion, writer: ProgressWriter) -> None:
        upload_path = self._storage.upload(row.upload_id)
        if not await asyncio.to_thread(upload_path.is_file):
            raise BuildError("upload_missing", "The uploaded file is gone. Upload it again.")
        self._storage.require_space(SPACE_FACTOR * row.upload_bytes)
        output_dir = await self._output_dir(row)
        built = await self._run(row, writer, output_dir)
        check_built(built)

        async def record(session: AsyncSession, artifact_id: str) -> None:
            await self._make_ready(session, row, built, artifact_id)

        files = await self._keep(output_dir, writer, record)
        self._note(row, f"[ready: {files.num_files} files, {files.size_bytes:,} bytes]")
        self._broadcast.publish(CHANGED)
        self._broadcast.publish(OPTIMISATIONS_TOPIC)

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

        def message(process: Process) -> Build:
            return Build(
                upload_path=process.path(upload_path),
                output_dir=process.path(output_dir),
                num_threads=launch.num_threads,
                hints=version_hints(version),
            )

        run = BuildRun(
            self._launcher,
            launch,
            errand=BUILD,
            message=message,
            result=Built,
            timeout_seconds=settings.build_timeout_seconds,
            on_progress=writer.report,
        )
        return await run.run()

    async def _make_ready(
        self, session: AsyncSession, version: ModelVersion, built: Built, artifact_id: str
    ) -> None:
        """The version, its deployment, and its place in the queue of those to be optimised. Raises
        `CancelledError` if the version is not being built any more."""
        is_ready = await change_status(
            session,
            BUILDS,
            version.id,
            since=("building",),
            status="ready",
            phase="done",
            phase_detail="",
            progress_permille=1000,
            artifact_id=artifact_id,
            manifest=manifest_json(built.manifest),
            receipt=receipt_json(built.receipt),
            finished_at=now(),
        )
        if not is_ready:
            raise asyncio.CancelledError
        ready = await session.get_one(ModelVersion, version.id, populate_existing=True)
        if await _has_newer_ready(session, ready):
            return
        await deploy_version(session, ready)
        if self._settings.optimise and is_optimisable(built.manifest):
            await enqueue(session, ready, "built")


async def _has_newer_ready(session: AsyncSession, version: ModelVersion) -> bool:
    """Whether a later upload of the same model was built first."""
    newer = await session.execute(
        select(ModelVersion.id)
        .where(
            ModelVersion.model_id == version.model_id,
            ModelVersion.number > version.number,
            ModelVersion.status == "ready",
        )
        .limit(1)
    )
    return newer.scalar_one_or_none() is not None
