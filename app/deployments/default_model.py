"""The model that the operator recommends: what `default` means as a model's name, and why.

Kept on its endpoint, so that it ends with it. What `default` runs on is `Fleet.resolve`'s.
"""

from datetime import datetime
from typing import NamedTuple

import msgspec
from sqlalchemy import or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.errors import InvalidRequest, NotFound
from app.deployments.tables import Deployment, Endpoint
from app.organizations.tables import Organization

MAX_NOTE_CHARS = 300


class DefaultModel(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is the endpoint's. Unless `is_public`, only its own organization can call it.
    `since` is None for one chosen by an older release."""

    name: str
    organization_id: str
    organization_name: str
    is_public: bool
    is_stopped: bool
    note: str
    since: datetime | None


async def find_default(
    session: AsyncSession, organization_id: str | None = None
) -> DefaultModel | None:
    """The recommended model; for an organization, only if it can call it."""
    query = (
        select(Endpoint, Organization.name, Deployment.is_stopped)
        .join(Organization, Organization.id == Endpoint.organization_id)
        .join(Deployment, Deployment.id == Endpoint.deployment_id)
        .where(Endpoint.is_default)
        .limit(1)
    )
    if organization_id is not None:
        query = query.where(or_(Endpoint.is_public, Endpoint.organization_id == organization_id))
    row = (await session.execute(query)).one_or_none()
    if row is None:
        return None
    endpoint, organization_name, is_stopped = row
    return DefaultModel(
        name=endpoint.name,
        organization_id=endpoint.organization_id,
        organization_name=organization_name,
        is_public=endpoint.is_public,
        is_stopped=is_stopped,
        note=endpoint.default_note,
        since=endpoint.default_since,
    )


class Candidate(NamedTuple):
    """An endpoint that can be recommended."""

    name: str
    is_public: bool


async def default_candidates(session: AsyncSession, organization_id: str) -> list[Candidate]:
    """What the operator, whose organization it is, can recommend: its own endpoints and all
    published ones, by name."""
    rows = await session.execute(
        select(Endpoint.name, Endpoint.is_public)
        .where(or_(Endpoint.is_public, Endpoint.organization_id == organization_id))
        .order_by(Endpoint.name)
    )
    return [Candidate(name, is_public) for name, is_public in rows]


async def choose_default(
    session: AsyncSession, organization_id: str, name: str, note: str = ""
) -> DefaultModel:
    """Recommends an endpoint instead of the one before. `organization_id` is the operator's, who
    the caller must be. Raises `NotFound` and `InvalidRequest`."""
    note = note.strip()
    if len(note) > MAX_NOTE_CHARS or not note.isprintable():
        raise InvalidRequest(
            f"The reason has at most {MAX_NOTE_CHARS} printable characters.", param="note"
        )
    chosen = await session.scalar(
        select(Endpoint).where(
            Endpoint.name == name,
            or_(Endpoint.is_public, Endpoint.organization_id == organization_id),
        )
    )
    if chosen is None:
        raise NotFound(
            f"There is no endpoint {name[:80]!r} of yours, nor a published one.", param="model"
        )
    since = chosen.default_since if chosen.is_default else None
    # One statement: of two at once, the later one wins whole.
    await session.execute(update(Endpoint).values(is_default=Endpoint.id == chosen.id))
    chosen.default_since, chosen.default_note = since or clock.now(), note
    await session.flush()
    found = await find_default(session)
    assert found is not None, "it was just chosen"
    return found


async def end_default(session: AsyncSession) -> None:
    """Nothing is recommended any more: calls of `default` answer 404."""
    await session.execute(
        update(Endpoint)
        .where(Endpoint.is_default)
        .values(is_default=False, default_note="", default_since=None)
    )
