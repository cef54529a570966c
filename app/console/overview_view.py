"""What the pages Overview and Box show: one read of the database, as plain values."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import defer

from app.billing.budgets import period_bounds
from app.billing.service import Account, read_account
from app.console.lamps import Lamp
from app.console.model_view import LIVE_REPLICAS, REPLICA_LAMPS, version_lamp
from app.core import clock
from app.deployments.default_model import DefaultModel, find_default
from app.deployments.tables import Endpoint, Replica
from app.metering.closed_hours import read_in_parts
from app.metering.hours import hour_of
from app.metering.tables import UsageHour, UsageSeries
from app.organizations.tables import Organization
from app.registry.tables import Model, ModelVersion

NUM_BUILDS = 5
MAX_REPLICAS = 200
TOKENS = ("input", "cached_input", "cache_write", "output")


class Sum(NamedTuple):
    """Of one dimension."""

    dimension: str
    quantity: int
    amount_nano: int


class Spell(msgspec.Struct, frozen=True):
    """What was used in a day or a month."""

    num_requests: int
    num_tokens: int
    spent_nano: int


class RunningLine(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that is there now."""

    endpoint_name: str
    organization_name: str
    version_number: int
    lamp: Lamp
    memory_bytes: int
    since: datetime


class BuildLine(msgspec.Struct, frozen=True, kw_only=True):
    """A version and how its build stands."""

    model: str
    number: int
    lamp: Lamp
    at: datetime
    took_seconds: float | None


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """`num_models` and all else but the device is the organization's own."""

    account: Account
    today: Spell
    month: Spell
    num_models: int
    running: Sequence[RunningLine]
    builds: Sequence[BuildLine]
    default: DefaultModel | None

    @property
    def memory_bytes(self) -> int:
        return sum(line.memory_bytes for line in self.running)


async def read_overview(session: AsyncSession, organization_id: str, currency: str) -> Overview:
    """Today and this month are UTC's."""
    now = clock.now()
    month_start, month_end = (hour_of(at) for at in period_bounds("month", now))
    day_start, _ = (hour_of(at) for at in period_bounds("day", now))
    before = await _read_sums(session, organization_id, month_start, day_start)
    today = await _read_sums(session, organization_id, day_start, month_end)
    num_models = await session.scalar(
        select(func.count()).select_from(Model).where(Model.organization_id == organization_id)
    )
    return Overview(
        account=await read_account(session, organization_id, currency),
        today=_spell(today),
        month=_spell([*before, *today]),
        num_models=num_models or 0,
        running=await read_running(session, organization_id),
        builds=await _read_builds(session, organization_id),
        default=await find_default(session, organization_id),
    )


async def read_running(
    session: AsyncSession, organization_id: str | None = None
) -> list[RunningLine]:
    """What holds memory now, by endpoint: of one organization or of the whole box."""
    query = (
        select(Replica, Endpoint.name, Organization.name, ModelVersion.number)
        .join(Endpoint, Endpoint.deployment_id == Replica.deployment_id)
        .join(Organization, Organization.id == Endpoint.organization_id)
        .join(ModelVersion, ModelVersion.id == Replica.version_id)
        .where(Replica.status.in_(LIVE_REPLICAS))
        .order_by(Endpoint.name, Replica.created_at)
        .limit(MAX_REPLICAS)
    )
    if organization_id is not None:
        query = query.where(Endpoint.organization_id == organization_id)
    return [
        RunningLine(
            endpoint_name=endpoint_name,
            organization_name=organization_name,
            version_number=number,
            lamp=REPLICA_LAMPS[replica.status],
            memory_bytes=replica.memory_bytes,
            since=replica.ready_at or replica.created_at,
        )
        for replica, endpoint_name, organization_name, number in await session.execute(query)
    ]


async def _read_builds(session: AsyncSession, organization_id: str) -> list[BuildLine]:
    rows = await session.execute(
        select(ModelVersion, Model.name)
        .join(Model, Model.id == ModelVersion.model_id)
        .options(
            defer(ModelVersion.manifest), defer(ModelVersion.receipt), defer(ModelVersion.hints)
        )
        .where(Model.organization_id == organization_id)
        .order_by(ModelVersion.created_at.desc(), ModelVersion.id.desc())
        .limit(NUM_BUILDS)
    )
    return [
        BuildLine(
            model=name,
            number=version.number,
            lamp=version_lamp(version),
            at=version.finished_at or version.created_at,
            took_seconds=(version.finished_at - version.created_at).total_seconds()
            if version.finished_at
            else None,
        )
        for version, name in rows
    ]


async def _read_sums(
    session: AsyncSession, organization_id: str, first: int, until: int
) -> list[Sum]:
    """What was used in the hours [first, until), which may be none."""

    async def read(first: int, until: int) -> list[tuple[str, int, int]]:
        rows = await session.execute(
            select(
                UsageSeries.dimension,
                func.sum(UsageHour.quantity),
                func.sum(UsageHour.amount_nano),
            )
            .join(UsageHour, UsageHour.series_id == UsageSeries.id)
            .where(
                UsageSeries.organization_id == organization_id,
                UsageHour.hour >= first,
                UsageHour.hour < until,
            )
            .group_by(UsageSeries.dimension)
        )
        return [(dimension, int(quantity), int(nano)) for dimension, quantity, nano in rows]

    name = ("overview", organization_id)
    rows = await read_in_parts(session, name, first, until, read, clock.now())
    return [Sum(*row) for row in rows]


def _spell(sums: Sequence[Sum]) -> Spell:
    return Spell(
        num_requests=sum(each.quantity for each in sums if each.dimension == "request"),
        num_tokens=sum(each.quantity for each in sums if each.dimension in TOKENS),
        spent_nano=sum(each.amount_nano for each in sums),
    )
