"""The row of a job, a version's build or its optimisation, while it waits and runs. Every write is
conditional on the status it starts from, so that a cancel and an end that meet agree on one."""

import asyncio
import logging

import msgspec
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.broadcast import Broadcast
from app.core.clock import now
from app.core.database import Database
from app.registry.tables import ModelVersion, Optimisation
from runtime.protocol import Progress

log = logging.getLogger(__name__)

WRITE_SECONDS = 0.25  # at most one write of progress in this time
LOOK_SECONDS = 1.0  # how often a running job looks whether it was cancelled elsewhere


class JobRows(msgspec.Struct, frozen=True):
    """Where jobs of one kind are kept, and the status of one that runs."""

    table: type[ModelVersion] | type[Optimisation]
    running: str


BUILDS = JobRows(ModelVersion, "building")
OPTIMISATIONS = JobRows(Optimisation, "running")


def begin(row: ModelVersion | Optimisation, rows: JobRows) -> None:
    """What a claim writes."""
    row.status = rows.running
    row.phase, row.phase_detail, row.progress_permille = "start", "", 0
    row.error_code = row.error_message = None


async def change_status(
    session: AsyncSession, rows: JobRows, row_id: str, *, since: tuple[str, ...], **values: object
) -> bool:
    """Whether the row had one of the statuses `since`, and so has the new values now."""
    table = rows.table
    result = await session.execute(
        update(table)
        .where(table.id == row_id, table.status.in_(since))
        .values(**values)
        .returning(table.id)
    )
    return result.scalar_one_or_none() is not None


async def requeue_interrupted(session: AsyncSession, rows: JobRows) -> None:
    """Jobs of an app that is no longer there begin anew."""
    table = rows.table
    await session.execute(
        update(table)
        .where(table.status == rows.running)
        .values(status="queued", phase="", phase_detail="", progress_permille=0)
    )


async def cancel(session: AsyncSession, rows: JobRows, row_id: str, message: str) -> bool:
    """Takes a job off the queue, or tells the one who runs it to stop."""
    return await change_status(
        session,
        rows,
        row_id,
        since=("queued", rows.running),
        status="cancelled",
        error_code="cancelled",
        error_message=message,
        finished_at=now(),
    )


async def fail(database: Database, rows: JobRows, row_id: str, code: str, message: str) -> bool:
    async with database.write() as session:
        return await change_status(
            session,
            rows,
            row_id,
            since=(rows.running,),
            status="failed",
            error_code=code[:64],
            error_message=message,
            finished_at=now(),
        )


class ProgressWriter:
    """Writes what a running job reports, a few times a second, and tells listeners of `topic`."""

    def __init__(
        self, database: Database, broadcast: Broadcast, rows: JobRows, row_id: str, topic: str
    ) -> None:
        self._database = database
        self._broadcast = broadcast
        self._rows = rows
        self._row_id = row_id
        self._topic = topic
        self._latest: Progress | None = None
        self._has_news = asyncio.Event()

    def report(self, progress: Progress) -> None:
        self._latest = progress
        self._has_news.set()

    async def run(self) -> None:
        """Returns when the job no longer runs: it was cancelled or deleted."""
        while await self._is_current():
            self._broadcast.publish(self._topic)
            await asyncio.sleep(WRITE_SECONDS)
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._has_news.wait()
            except TimeoutError:
                continue

    async def _is_current(self) -> bool:
        try:
            return await self._write()
        except SQLAlchemyError as error:  # progress is not worth a job
            log.warning("progress of %s was not written: %s", self._row_id, error)
            return True

    async def _write(self) -> bool:
        self._has_news.clear()
        latest, self._latest = self._latest, None
        table, running = self._rows.table, self._rows.running
        if latest is None:
            async with self._database.read() as session:
                status = await session.scalar(select(table.status).where(table.id == self._row_id))
            return status == running
        async with self._database.write() as session:
            return await change_status(
                session,
                self._rows,
                self._row_id,
                since=(running,),
                phase=latest.phase,
                phase_detail=latest.detail,
                progress_permille=int(latest.fraction * 1000),
            )
