"""The mirror: the last state of each object that we read from Stripe, for people and reconcilers.

No posting is decided by it. Notes of our own are kept beside, such as how far events were listed
(`inbox.py`) and which cards are disputed (`profile.py`).
"""

from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.tables import StripeMirror
from app.core import clock
from app.core.database import upsert


async def store(session: AsyncSession, seen: Any) -> None:
    """Keeps one of the structs of `stripe_objects.py`. The caller holds the account's lock."""
    kind = type(seen).__name__.lower()
    await put(session, seen.id, kind, msgspec.to_builtins(seen))


async def put(session: AsyncSession, id: str, kind: str, data: dict[str, Any]) -> None:
    """The newer state of an object; also where another process keeps its first one meanwhile."""
    connection = await session.connection()
    state = {"kind": kind, "data": data, "read_at": clock.now()}
    statement = upsert(connection.dialect.name, StripeMirror).values(id=id, **state)
    await session.scalars(
        statement.on_conflict_do_update(index_elements=["id"], set_=state).returning(StripeMirror),
        execution_options={"populate_existing": True},
    )


async def read(session: AsyncSession, id: str) -> StripeMirror | None:
    return await session.get(StripeMirror, id)
