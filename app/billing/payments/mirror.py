"""The mirror: the last state of each object that we read from Stripe, for people and reconcilers.

No posting is decided by it. Notes of our own are kept beside, such as how far events were listed
(`inbox.py`) and which cards are disputed (`profile.py`).
"""

from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.tables import StripeMirror
from app.core import clock


async def store(session: AsyncSession, seen: Any) -> None:
    """Keeps one of the structs of `stripe_objects.py`. The caller holds the account's lock."""
    kind = type(seen).__name__.lower()
    await put(session, seen.id, kind, msgspec.to_builtins(seen))


async def put(session: AsyncSession, id: str, kind: str, data: dict[str, Any]) -> None:
    row = await session.scalar(
        select(StripeMirror)
        .where(StripeMirror.id == id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if row is None:
        session.add(StripeMirror(id=id, kind=kind, data=data, read_at=clock.now()))
    else:
        row.kind, row.data, row.read_at = kind, data, clock.now()
    await session.flush()


async def read(session: AsyncSession, id: str) -> StripeMirror | None:
    return await session.get(StripeMirror, id)
