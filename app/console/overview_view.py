"""What the pages Overview and Box show: one read of the database, as plain values."""

from collections.abc import Sequence
from datetime import datetime

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
from app.metering.service import UsageCells, day_of, read_usage_days
from app.organizations.tables import Organization
from app.registry.tables import Model, ModelVersion

NUM_BUILDS = 5
MAX_REPLICAS = 200
TOKENS = ("input", "cached_input", "cache_write", "output")


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
    start, end = period_bounds("month", now)
    month = await read_usage_days(session, organization_id, start, end)
    today = UsageCells([cell for cell in month.cells if day_of(cell) == now.date().isoformat()])
    num_models = await session.scalar(
        select(func.count()).select_from(Model).where(Model.organization_id == organization_id)
    )
    return Overview(
        account=await read_account(session, organization_id, currency),
        today=_spell(today),
        month=_spell(month),
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


def _spell(cells: UsageCells) -> Spell:
    used = cells.quantities()
    return Spell(
        num_requests=used.get("request", 0),
        num_tokens=sum(used.get(dimension, 0) for dimension in TOKENS),
        spent_nano=cells.total_nano,
    )
