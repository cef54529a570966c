"""The row of a version while it is built. Every write is conditional on the status it starts
from, so that a cancel and an end that meet agree on one of them."""

import asyncio
import logging

from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.broadcast import Broadcast
from app.core.clock import now
from app.core.database import Database
from app.registry.tables import ModelVersion
from runtime.protocol import Progress

log = logging.getLogger(__name__)

WRITE_SECONDS = 0.25  # at most one write of progress in this time
LOOK_SECONDS = 1.0  # how often a running build looks whether it was cancelled elsewhere


async def claim(session: AsyncSession) -> ModelVersion | None:
    """Takes the oldest queued version to build, if there is one."""
    oldest = (
        select(ModelVersion)
        .where(ModelVersion.status == "queued")
        .order_by(ModelVersion.created_at, ModelVersion.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    version = (await session.execute(oldest)).scalar_one_or_none()
    if version is not None:
        version.status = "building"
        version.phase, version.phase_detail, version.progress_permille = "start", "", 0
        version.error_code = version.error_message = None
    return version


async def change_status(
    session: AsyncSession, version_id: str, *, since: tuple[str, ...], **values: object
) -> bool:
    """Whether the version had one of the statuses `since`, and so has the new values now."""
    result = await session.execute(
        update(ModelVersion)
        .where(ModelVersion.id == version_id, ModelVersion.status.in_(since))
        .values(**values)
        .returning(ModelVersion.id)
    )
    return result.scalar_one_or_none() is not None


async def requeue_interrupted(session: AsyncSession) -> None:
    """Builds of an app that is no longer there begin anew."""
    await session.execute(
        update(ModelVersion)
        .where(ModelVersion.status == "building")
        .values(status="queued", phase="", phase_detail="", progress_permille=0)
    )


async def fail(database: Database, version_id: str, code: str, message: str) -> bool:
    async with database.write() as session:
        return await change_status(
            session,
            version_id,
            since=("building",),
            status="failed",
            error_code=code[:64],
            error_message=message,
            finished_at=now(),
        )


async def has_newer_ready(session: AsyncSession, version: ModelVersion) -> bool:
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


class ProgressWriter:
    """Writes what a running build reports, a few times a second, and tells listeners."""

    def __init__(self, database: Database, broadcast: Broadcast, version_id: str) -> None:
        self._database = database
        self._broadcast = broadcast
        self._version_id = version_id
        self._latest: Progress | None = None
        self._has_news = asyncio.Event()

    def report(self, progress: Progress) -> None:
        self._latest = progress
        self._has_news.set()

    async def run(self) -> None:
        """Returns when the version is no longer being built: it was cancelled or deleted."""
        while await self._is_current():
            self._broadcast.publish(f"version:{self._version_id}")
            await asyncio.sleep(WRITE_SECONDS)
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._has_news.wait()
            except TimeoutError:
                continue

    async def _is_current(self) -> bool:
        try:
            return await self._write()
        except SQLAlchemyError as error:  # progress is not worth a build
            log.warning("progress of %s was not written: %s", self._version_id, error)
            return True

    async def _write(self) -> bool:
        self._has_news.clear()
        latest, self._latest = self._latest, None
        if latest is None:
            async with self._database.read() as session:
                status = await session.scalar(
                    select(ModelVersion.status).where(ModelVersion.id == self._version_id)
                )
            return status == "building"
        async with self._database.write() as session:
            return await change_status(
                session,
                self._version_id,
                since=("building",),
                phase=latest.phase,
                phase_detail=latest.detail,
                progress_permille=int(latest.fraction * 1000),
            )
