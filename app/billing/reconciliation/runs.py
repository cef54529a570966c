"""Runs of the comparison as they are kept: the last thousand, and of each earlier day one.

Owns how a run is stored and read, and which differences count as confirmed.
"""

from collections.abc import Sequence
from datetime import datetime

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.tables import ReconciliationRun
from app.billing.reconciliation.check import Check
from app.core.ids import new_id

NUM_KEPT = 1_000
MAX_PRUNED = 2_000  # looked at in one go


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison of all the books. `positions` are where the next one goes on."""

    id: str
    started_at: datetime
    finished_at: datetime
    num_differences: int
    num_confirmed: int
    checks: list[Check]
    positions: dict[str, int] = {}

    @property
    def took_ms(self) -> int:
        return round((self.finished_at - self.started_at).total_seconds() * 1000)  # seconds to ms


class _Stored(msgspec.Struct):
    """The column `checks`."""

    checks: list[Check]
    positions: dict[str, int] = {}


class PastRun(msgspec.Struct, frozen=True):
    """A line of the history."""

    id: str
    started_at: datetime
    num_differences: int
    num_confirmed: int
    found: list[str]  # `check: difference`


def confirmed(checks: Sequence[Check], before: Sequence[Check]) -> list[Check]:
    """The checks with what the run before had found as well: a moment's difference, as between
    two systems that are not read at once, is none."""
    known = {check.name: {d.name for d in check.differences} for check in before}
    return [
        msgspec.structs.replace(
            check,
            confirmed=[d.name for d in check.differences if d.name in known.get(check.name, ())],
        )
        for check in checks
    ]


def make_run(
    started_at: datetime, finished_at: datetime, checks: list[Check], positions: dict[str, int]
) -> Run:
    return Run(
        id=new_id("rec"),
        started_at=started_at,
        finished_at=finished_at,
        num_differences=sum(check.num_differences for check in checks),
        num_confirmed=sum(len(check.confirmed) for check in checks),
        checks=checks,
        positions=positions,
    )


def add_run(session: AsyncSession, run: Run) -> None:
    session.add(
        ReconciliationRun(
            id=run.id,
            started_at=run.started_at,
            finished_at=run.finished_at,
            num_differences=run.num_differences,
            checks=msgspec.to_builtins(_Stored(run.checks, run.positions)),
        )
    )


def _run(row: ReconciliationRun) -> Run:
    stored = msgspec.convert(row.checks, _Stored)
    return Run(
        id=row.id,
        started_at=row.started_at,
        finished_at=row.finished_at,
        num_differences=row.num_differences,
        num_confirmed=sum(len(check.confirmed) for check in stored.checks),
        checks=stored.checks,
        positions=stored.positions,
    )


async def latest_run(session: AsyncSession, now: datetime) -> Run | None:
    """The last one that is stored. Runs of the future are of a clock that was wrong, and may be
    older than all others."""
    row = await session.scalar(
        select(ReconciliationRun)
        .where(ReconciliationRun.started_at <= now)
        .order_by(ReconciliationRun.started_at.desc())
        .limit(1)
    )
    return None if row is None else _run(row)


async def find_run(session: AsyncSession, run_id: str) -> Run | None:
    row = await session.get(ReconciliationRun, run_id)
    return None if row is None else _run(row)


async def past_differences(session: AsyncSession, limit: int) -> list[PastRun]:
    """The last runs that found any, the newest first."""
    rows = await session.scalars(
        select(ReconciliationRun)
        .where(ReconciliationRun.num_differences > 0)
        .order_by(ReconciliationRun.started_at.desc())
        .limit(limit)
    )
    runs = [_run(row) for row in rows]
    return [
        PastRun(
            run.id,
            run.started_at,
            run.num_differences,
            run.num_confirmed,
            [f"{check.title}: {d.name}" for check in run.checks for d in check.differences],
        )
        for run in runs
    ]


async def prune(session: AsyncSession, now: datetime) -> None:
    """Of what is older than the last thousand runs, and of what a wrong clock put into the future,
    one a day stays: that with most to tell."""
    run = ReconciliationRun
    query = select(run.id, run.started_at, run.num_differences).order_by(run.started_at.desc())
    old = await session.execute(
        query.where(run.started_at <= now).offset(NUM_KEPT).limit(MAX_PRUNED)
    )
    future = await session.execute(query.where(run.started_at > now).limit(MAX_PRUNED))
    best: dict[str, tuple[int, str]] = {}
    ids: set[str] = set()
    for run_id, started_at, num_differences in [*old, *future]:
        day = f"{started_at:%Y-%m-%d}"
        ids.add(run_id)
        best[day] = max(best.get(day, (-1, "")), (num_differences, run_id))
    gone = ids - {run_id for _, run_id in best.values()}
    if gone:
        await session.execute(delete(ReconciliationRun).where(ReconciliationRun.id.in_(gone)))
