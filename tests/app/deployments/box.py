"""A whole control plane of deployments for a test: rows, builder and fleet over fake processes."""

from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import select

from app.core.broadcast import Broadcast
from app.core.clock import now
from app.core.database import Database
from app.core.ids import new_id
from app.core.storage import Storage
from app.deployments.acceptance import manifest_json, receipt_json
from app.deployments.builder import Builder
from app.deployments.fleet import Fleet
from app.deployments.launchers.local import LocalLauncher
from app.deployments.optimiser import Optimiser
from app.deployments.replica import Timing
from app.deployments.service import CHANGED, deploy_version
from app.deployments.tables import Replica
from app.organizations.principal import Principal
from app.organizations.tables import Organization
from app.registry.tables import Artifact, Model, ModelVersion
from app.settings import Settings
from runtime.protocol import Manifest, SequenceOutput
from tests.app.deployments.fake_process import DECODER, RECEIPT

QUICK = Timing(
    connect=20.0,
    start=20.0,
    first_back_off=0.05,
    max_back_off=0.2,
    late_requests=0.1,
    stop=2.0,
)


@dataclass
class Box:
    """`fleet`, `builder` and `optimiser` are started by the tests that need them."""

    database: Database
    storage: Storage
    settings: Settings
    launcher: LocalLauncher
    broadcast: Broadcast = field(default_factory=Broadcast)
    committed: list[SequenceOutput] = field(default_factory=list)
    timing: Timing = QUICK

    def __post_init__(self) -> None:
        self.builder = self.new_builder()
        self.fleet = self.new_fleet()
        self.optimiser = self.new_optimiser()

    def new_builder(self, **options: Any) -> Builder:
        return Builder(
            self.database, self.storage, self.launcher, self.broadcast, self.settings, **options
        )

    def new_optimiser(self, **options: Any) -> Optimiser:
        return Optimiser(
            self.database,
            self.storage,
            self.launcher,
            self.broadcast,
            self.settings,
            self.fleet,
            **options,
        )

    def new_fleet(self) -> Fleet:
        return Fleet(
            self.database,
            self.storage,
            self.launcher,
            self.broadcast,
            self.settings,
            self.commit,
            timing=self.timing,
        )

    async def commit(self, outputs: list[SequenceOutput]) -> None:
        self.committed += outputs

    async def organization(self, name: str = "acme") -> Principal:
        """The organization of this name, made if need be, as a caller."""
        async with self.database.write() as session:
            row = await session.scalar(select(Organization).where(Organization.name == name))
            if row is None:
                row = Organization(
                    id=new_id("org"), name=name, cache_salt=b"salt", created_at=now()
                )
                session.add(row)
        return Principal(
            organization_id=row.id,
            organization_name=name,
            cache_salt=row.cache_salt,
            is_operator=False,
            scopes=frozenset({"inference"}),
        )

    async def version(
        self,
        name: str = "tiny",
        *,
        content: bytes = b"weights",
        organization: str = "acme",
        status: str = "queued",
    ) -> ModelVersion:
        """The next version of a model, with its upload in storage."""
        owner = await self.organization(organization)
        async with self.database.write() as session:
            model = await session.scalar(
                select(Model).where(
                    Model.name == name, Model.organization_id == owner.organization_id
                )
            )
            if model is None:
                model = Model(
                    id=new_id("mdl"),
                    organization_id=owner.organization_id,
                    name=name,
                    created_at=now(),
                )
                session.add(model)
                await session.flush()
            numbers = await session.scalars(
                select(ModelVersion.number).where(ModelVersion.model_id == model.id)
            )
            version = ModelVersion(
                id=new_id("ver"),
                model_id=model.id,
                number=max(numbers, default=0) + 1,
                upload_id=new_id("upl"),
                filename="m.tar",
                upload_bytes=len(content),
                sha256="0" * 64,
                status=status,
                created_at=now(),
            )
            session.add(version)
        self.storage.upload(version.upload_id).write_bytes(content)
        return version

    async def deployed(
        self,
        name: str = "tiny",
        *,
        is_broken: bool = False,
        manifest: Manifest = DECODER,
        **options: Any,
    ) -> ModelVersion:
        """A version as a build would have left it, deployed. A broken one does not load."""
        version = await self.version(name, status="building")
        artifact_id = new_id("art")
        directory = self.storage.artifact(artifact_id)
        directory.mkdir()
        (directory / "program.json").write_bytes(msgspec.json.encode(manifest))
        if is_broken:
            (directory / "broken").touch()
        async with self.database.write() as session:
            session.add(Artifact(id=artifact_id, digest=version.id, size_bytes=1, created_at=now()))
            await session.flush()
            row = await session.get_one(ModelVersion, version.id)
            row.status, row.artifact_id = "ready", artifact_id
            row.manifest, row.receipt = manifest_json(manifest), receipt_json(RECEIPT)
            await deploy_version(session, row, **options)
        self.broadcast.publish(CHANGED)
        return row

    async def read(self, version: ModelVersion) -> ModelVersion:
        async with self.database.read() as session:
            return await session.get_one(ModelVersion, version.id)

    async def replicas(self) -> list[Replica]:
        """Newest first."""
        async with self.database.read() as session:
            rows = await session.scalars(
                select(Replica).order_by(Replica.created_at.desc(), Replica.id.desc())
            )
            return list(rows)
