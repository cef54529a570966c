"""What a caller should know of how a version is served, in one sentence."""

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.deployments.tables import Deployment, Endpoint
from app.registry.tables import ModelVersion
from runtime.protocol import Manifest

UNCACHED = "Served uncached: every token recomputes the whole sequence."


async def serving_note(session: AsyncSession, endpoint_name: str, version_number: int) -> str:
    """Of the version that an endpoint served under that number; empty where there is nothing to
    say, or the model is gone."""
    manifest = await session.scalar(
        select(ModelVersion.manifest)
        .join(Deployment, Deployment.model_id == ModelVersion.model_id)
        .join(Endpoint, Endpoint.deployment_id == Deployment.id)
        .where(Endpoint.name == endpoint_name, ModelVersion.number == version_number)
    )
    decoder = msgspec.convert(manifest, Manifest).decoder if manifest else None
    if decoder is None or decoder.is_paged:
        return ""
    return f"{UNCACHED} {decoder.unpaged_reason}".strip()
