"""The rows that tell people what replicas do and did. Nothing is decided from them."""

import asyncio

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.clock import now
from app.core.database import Database
from app.core.storage import Storage
from app.deployments.logs import delete_log, replica_log_name
from app.deployments.tables import Replica

NUM_KEPT = 20  # ended replicas remembered per deployment, with their logs


async def mark_interrupted(session: AsyncSession) -> None:
    """Replicas of an app that is no longer there have ended with it."""
    await session.execute(
        update(Replica)
        .where(Replica.status != "stopped")
        .values(status="stopped", detail="The app was restarted.", stopped_at=now())
    )


async def prune(database: Database, storage: Storage, deployment_id: str) -> None:
    """Forgets the oldest ended replicas of a deployment."""
    async with database.write() as session:
        rows = await session.execute(
            select(Replica.id)
            .where(Replica.deployment_id == deployment_id, Replica.status == "stopped")
            .order_by(Replica.created_at.desc(), Replica.id.desc())
            .offset(NUM_KEPT)
        )
        old_ids = list(rows.scalars())
        if old_ids:
            await session.execute(delete(Replica).where(Replica.id.in_(old_ids)))
    for replica_id in old_ids:
        await asyncio.to_thread(delete_log, storage.log(replica_log_name(replica_id)))
