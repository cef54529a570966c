"""What should run, as one read of the database tells it, and the pure decision of what to do.

Owns no processes: `reconciler.py` acts on it.
"""

import logging
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.deployments.acceptance import read_manifest, read_receipt
from app.deployments.tables import Deployment, Endpoint, Revision
from app.registry.tables import Model, ModelVersion
from runtime.protocol import BuildReceipt, Manifest

log = logging.getLogger(__name__)


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment with its endpoint and the revision in force."""

    deployment_id: str
    organization_id: str
    endpoint_name: str
    is_public: bool
    is_default: bool
    is_stopped: bool
    model_name: str
    revision_id: str
    num_replicas: int
    serving: dict[str, Any]
    version_id: str
    version_number: int
    artifact_id: str
    manifest: Manifest
    receipt: BuildReceipt

    def runs_like(self, other: "Desired") -> bool:
        """A replica started for the one can serve the other."""
        return (
            self.version_id == other.version_id
            and self.artifact_id == other.artifact_id
            and self.serving == other.serving
        )


class _Built(msgspec.Struct, frozen=True):
    """What a version serves. `found` is None when another release stored it and this one cannot
    read it."""

    artifact_id: str | None
    found: tuple[Manifest, BuildReceipt] | None


class DesiredReader:
    """Reads all deployments. What a version serves changes with its artifact alone, so it is
    decoded once for each."""

    def __init__(self) -> None:
        self._built: dict[str, _Built] = {}

    async def read(self, session: AsyncSession) -> dict[str, Desired]:
        """By deployment id. A deployment whose version cannot be served is left out."""
        rows = await session.execute(
            select(
                Deployment,
                Endpoint,
                Model.name,
                Revision,
                ModelVersion.id,
                ModelVersion.number,
                ModelVersion.artifact_id,
            )
            .join(Endpoint, Endpoint.deployment_id == Deployment.id)
            .join(Model, Model.id == Deployment.model_id)
            .join(Revision, Revision.id == Deployment.revision_id)
            .join(ModelVersion, ModelVersion.id == Revision.version_id)
            .where(ModelVersion.status == "ready", ModelVersion.artifact_id.is_not(None))
        )
        found = rows.all()
        await self._read_built(session, {row[4]: row[6] for row in found})
        desired: dict[str, Desired] = {}
        for deployment, endpoint, model_name, revision, version_id, number, _ in found:
            built = self._built.get(version_id)
            if built is None or built.found is None or built.artifact_id is None:
                continue
            manifest, receipt = built.found
            desired[deployment.id] = Desired(
                deployment_id=deployment.id,
                organization_id=deployment.organization_id,
                endpoint_name=endpoint.name,
                is_public=endpoint.is_public,
                is_default=endpoint.is_default,
                is_stopped=deployment.is_stopped,
                model_name=model_name,
                revision_id=revision.id,
                num_replicas=revision.num_replicas,
                serving=revision.serving,
                version_id=version_id,
                version_number=number,
                artifact_id=built.artifact_id,
                manifest=manifest,
                receipt=receipt,
            )
        return desired

    async def _read_built(self, session: AsyncSession, artifact_ids: dict[str, str | None]) -> None:
        """Of versions, by id, what they serve now."""
        self._built = {
            version_id: built
            for version_id, built in self._built.items()
            if artifact_ids.get(version_id) == built.artifact_id
        }
        missing = artifact_ids.keys() - self._built.keys()
        if not missing:
            return
        # With the artifact again: it may have been replaced since the first look.
        rows = await session.execute(
            select(
                ModelVersion.id,
                ModelVersion.artifact_id,
                ModelVersion.manifest,
                ModelVersion.receipt,
            ).where(ModelVersion.id.in_(missing))
        )
        for version_id, artifact_id, manifest, receipt in rows:
            try:
                found = read_manifest(manifest), read_receipt(receipt)
            except msgspec.ValidationError as error:
                log.error("version %s must be uploaded again: %s", version_id, error)
                found = None
            self._built[version_id] = _Built(artifact_id, found)


class Running(Protocol):
    """What a decision needs to know of a replica."""

    @property
    def desired(self) -> Desired: ...
    @property
    def is_ready(self) -> bool: ...
    @property
    def is_retired(self) -> bool:
        """On its way out: it takes no new requests and does not come back."""
        ...

    @property
    def has_been_ready(self) -> bool: ...
    @property
    def has_failed(self) -> bool: ...


R = TypeVar("R", bound=Running)


class Plan(msgspec.Struct, frozen=True):
    """How many replicas of the desired revision to start, and which replicas to retire."""

    num_to_start: int
    to_retire: list[Any]


def plan(desired: Desired | None, running: Sequence[R]) -> Plan:
    """The last version that answered stays until the desired one does."""
    if desired is None or desired.is_stopped:
        return Plan(0, [replica for replica in running if not replica.is_retired])
    current, others = _split(desired, running)
    surplus = sorted(current, key=lambda replica: not replica.is_ready)[desired.num_replicas :]
    if _has_taken_over(desired, current):
        outdated = others
    else:
        outdated = [replica for replica in others if not replica.has_been_ready]
    return Plan(max(0, desired.num_replicas - len(current)), [*surplus, *outdated])


def route(desired: Desired, running: Sequence[R]) -> list[R]:
    """The replicas that take new requests."""
    if desired.is_stopped:
        return []
    current, others = _split(desired, running)
    ready = [replica for replica in current if replica.is_ready]
    older = [replica for replica in others if replica.is_ready]
    return ready if _has_taken_over(desired, current) or not older else older


def _split(desired: Desired, running: Sequence[R]) -> tuple[list[R], list[R]]:
    current: list[R] = []
    others: list[R] = []
    for replica in running:
        if not replica.is_retired:
            (current if replica.desired.runs_like(desired) else others).append(replica)
    return current, others


def _has_taken_over(desired: Desired, current: Sequence[Running]) -> bool:
    """Enough of the new revision answers: all of it, but for replicas that fail to start."""
    num_ready = sum(replica.is_ready for replica in current)
    num_pending = sum(not replica.is_ready and not replica.has_failed for replica in current)
    missing = max(0, desired.num_replicas - len(current))
    return num_ready > 0 and num_pending == 0 and missing == 0
