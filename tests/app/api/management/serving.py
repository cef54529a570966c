"""A model of an organization with everything that routes can name."""

from typing import Any

import msgspec
from sqlalchemy import select

from app.core import clock
from app.core.database import Database
from app.deployments.service import deploy_version
from app.deployments.tables import Deployment, Replica
from app.organizations.tables import ApiKey
from app.registry import service as registry
from app.registry.tables import ModelVersion
from app.registry.uploads import UploadStore
from tests.app.api.management.callers import Caller
from tests.app.registry.conftest import stream


class Serving(msgspec.Struct, frozen=True):
    """`upload_id` is of an unfinished upload."""

    caller: Caller
    upload_id: str
    key_id: str
    version_id: str
    replica_id: str

    def names(self) -> dict[str, Any]:
        return {
            "upload_id": self.upload_id,
            "key_id": self.key_id,
            "name": "digits",
            "number": 1,
            "endpoint": "digits",
        }


async def make_serving(
    database: Database, uploads: UploadStore, caller: Caller, principal: Any, program: bytes
) -> Serving:
    """A ready version with an endpoint and a replica, and an unfinished upload."""
    organization_id = caller.organization_id
    upload = await uploads.create(principal, "digits.pt2", len(program))
    await uploads.append(upload.id, organization_id, 0, stream(program))
    upload = await uploads.get(upload.id, organization_id)
    unfinished = await uploads.create(principal, "more.pt2", 10)
    async with database.write() as session:
        version = await registry.create_version(session, organization_id, "digits", upload)
        version.status = "ready"
        version.manifest = {"kind": "tensor"}
        await session.flush()
        endpoint = await deploy_version(session, version)
        deployment = await session.get_one(Deployment, endpoint.deployment_id)
        replica = Replica(
            id="replica_1",
            deployment_id=deployment.id,
            revision_id=deployment.revision_id or "",
            version_id=version.id,
            status="starting",
            detail="loading",
            memory_bytes=5,
            created_at=clock.now(),
            ready_at=None,
            stopped_at=None,
        )
        session.add(replica)
        key_id = await session.scalar(
            select(ApiKey.id).where(ApiKey.organization_id == organization_id)
        )
        assert key_id is not None
    return Serving(caller, unfinished.id, key_id, version.id, replica.id)


async def set_version(database: Database, version_id: str, **values: object) -> None:
    """Plays the builder."""
    async with database.write() as session:
        version = await session.get_one(ModelVersion, version_id)
        for name, value in values.items():
            setattr(version, name, value)
