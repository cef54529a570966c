"""Models and their versions: made of complete uploads, listed, deleted.

Building a version is deployments' business; here it only waits as `queued`.
"""

import asyncio
import shutil
from pathlib import Path

import msgspec
from sqlalchemy import Select, delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.broadcast import Broadcast
from app.core.database import Database
from app.core.errors import Conflict, NotFound
from app.core.ids import new_id
from app.core.storage import Storage
from app.registry.input_hints import Said, with_remembered
from app.registry.inspection import Inspection, inspect_upload
from app.registry.names import check_model_name
from app.registry.tables import Artifact, Model, ModelVersion, Optimisation, Upload
from app.registry.uploads import UploadStore
from runtime.protocol import BuildHints

BUILDS_TOPIC = "builds"  # told that a version is queued


class RemovedFiles(msgspec.Struct, frozen=True):
    """What lies in storage under a deleted model's rows, for after the transaction."""

    upload_ids: list[str]
    artifact_ids: list[str]
    version_ids: list[str]


class ModelSummary(msgspec.Struct, frozen=True):
    """A model as lists show it. `latest_version` is the one with the highest number."""

    model: Model
    latest_version: ModelVersion | None


async def submit(
    database: Database,
    uploads: UploadStore,
    storage: Storage,
    broadcast: Broadcast,
    organization_id: str,
    model_name: str,
    upload_id: str,
    said: Said = Said(),  # noqa: B008 -- immutable
) -> tuple[ModelVersion, Inspection]:
    """Inspects a complete upload in a thread and queues a version of it to be built. Raises
    `Unprocessable` with what to do for a file that cannot be served."""
    check_model_name(model_name)
    upload = await uploads.get(upload_id, organization_id)
    _require_complete(upload)
    async with database.read() as session:
        await _check_name_is_free(session, organization_id, model_name)
    inspection = await asyncio.to_thread(inspect_upload, storage.upload(upload.id), upload.filename)
    async with database.write() as session:
        version = await create_version(session, organization_id, model_name, upload, said)
    broadcast.publish(BUILDS_TOPIC)
    return version, inspection


async def create_version(
    session: AsyncSession,
    organization_id: str,
    model_name: str,
    upload: Upload,
    said: Said = Said(),  # noqa: B008 -- immutable
) -> ModelVersion:
    """The model's next version, queued; makes the model if there is none of this name. The upload
    was inspected. What is not `said` is as of the last version. Raises `Conflict` if the name
    belongs to another organization."""
    check_model_name(model_name)
    assert upload.organization_id == organization_id, "the upload was looked up by organization"
    _require_complete(upload)
    assert upload.sha256 is not None, "a complete upload is hashed"
    await _check_name_is_free(session, organization_id, model_name)
    model = await _locked_model(session, organization_id, model_name)
    newest = await session.scalar(
        select(ModelVersion)
        .where(ModelVersion.model_id == model.id)
        .order_by(ModelVersion.number.desc())
        .limit(1)
    )
    hints = with_remembered(said, version_hints(newest) if newest else BuildHints())
    version = ModelVersion(
        id=new_id("version"),
        model_id=model.id,
        number=newest.number + 1 if newest else 1,
        upload_id=upload.id,
        filename=upload.filename,
        upload_bytes=upload.length_bytes,
        sha256=upload.sha256,
        hints=msgspec.to_builtins(hints),
        status="queued",
        phase="",
        phase_detail="",
        progress_permille=0,
        error_code=None,
        error_message=None,
        artifact_id=None,
        manifest=None,
        receipt=None,
        created_at=clock.now(),
        finished_at=None,
    )
    session.add(version)
    await session.flush()
    return version


def version_hints(version: ModelVersion) -> BuildHints:
    """What its owner says of a version's file."""
    return msgspec.convert(version.hints, BuildHints) if version.hints else BuildHints()


async def get_model(session: AsyncSession, organization_id: str, name: str) -> Model:
    model = await session.scalar(_model(organization_id, name))
    if model is None:
        raise _no_such_model(name)
    return model


async def list_models(session: AsyncSession, organization_id: str) -> list[ModelSummary]:
    """By name."""
    newest = (
        select(ModelVersion.model_id, func.max(ModelVersion.number).label("number"))
        .group_by(ModelVersion.model_id)
        .subquery()
    )
    rows = await session.execute(
        select(Model, ModelVersion)
        .outerjoin(newest, newest.c.model_id == Model.id)
        .outerjoin(
            ModelVersion,
            (ModelVersion.model_id == Model.id) & (ModelVersion.number == newest.c.number),
        )
        .where(Model.organization_id == organization_id)
        .order_by(Model.name)
    )
    return [ModelSummary(model, version) for model, version in rows]


async def list_versions(
    session: AsyncSession, organization_id: str, name: str
) -> list[ModelVersion]:
    """Newest first. Raises `NotFound` if there is no such model."""
    model = await get_model(session, organization_id, name)
    rows = await session.scalars(
        select(ModelVersion)
        .where(ModelVersion.model_id == model.id)
        .order_by(ModelVersion.number.desc())
    )
    return list(rows)


async def get_version(
    session: AsyncSession, organization_id: str, name: str, number: int
) -> ModelVersion:
    version = await session.scalar(
        select(ModelVersion)
        .join(Model, Model.id == ModelVersion.model_id)
        .where(
            Model.organization_id == organization_id,
            Model.name == name,
            ModelVersion.number == number,
        )
    )
    if version is None:
        raise NotFound(
            f"There is no version {number} of a model {name[:80]!r}.", code="version_not_found"
        )
    return version


async def delete_model(session: AsyncSession, organization_id: str, name: str) -> RemovedFiles:
    """Deletes a model with its versions, endpoint and deployment; usage and receipts stay. Raises
    `Conflict` while one of its versions is being built. The files are the caller's to remove,
    with `remove_files`, once this is committed."""
    model = await session.scalar(_model(organization_id, name).with_for_update())
    if model is None:
        raise _no_such_model(name)
    versions = list(
        await session.scalars(select(ModelVersion).where(ModelVersion.model_id == model.id))
    )
    for version in versions:
        if version.status == "building":
            raise Conflict(
                f"Version {version.number} is being built. Cancel the build first.",
                code="build_running",
            )
    upload_ids = {version.upload_id for version in versions}
    artifact_ids = await named_artifacts(session, [version.id for version in versions])
    await session.execute(delete(Model).where(Model.id == model.id))
    still_used = select(ModelVersion.upload_id).where(ModelVersion.upload_id.in_(upload_ids))
    upload_ids -= set(await session.scalars(still_used))
    await session.execute(delete(Upload).where(Upload.id.in_(upload_ids)))
    artifact_ids -= await named_artifacts(session)
    await session.execute(delete(Artifact).where(Artifact.id.in_(artifact_ids)))
    return RemovedFiles(
        sorted(upload_ids), sorted(artifact_ids), sorted(version.id for version in versions)
    )


async def named_artifacts(session: AsyncSession, version_ids: list[str] | None = None) -> set[str]:
    """Artifacts that these versions, or all, and their optimisations name."""
    named: set[str] = set()
    for column, version_id in (
        (ModelVersion.artifact_id, ModelVersion.id),
        (Optimisation.artifact_id, Optimisation.version_id),
        (Optimisation.base_artifact_id, Optimisation.version_id),
    ):
        chosen = select(column).where(column.is_not(None)).distinct()
        if version_ids is not None:
            chosen = chosen.where(version_id.in_(version_ids))
        named |= {artifact_id for artifact_id in await session.scalars(chosen) if artifact_id}
    return named


async def remove_files(storage: Storage, uploads: UploadStore, removed: RemovedFiles) -> None:
    """Frees the disk of a deleted model. A replica that still runs keeps the files it has open."""
    await uploads.remove_files(removed.upload_ids)
    paths = [storage.artifact(artifact_id) for artifact_id in removed.artifact_ids]
    paths += [storage.build(version_id) for version_id in removed.version_ids]
    await asyncio.to_thread(_remove_trees, paths)


def _remove_trees(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)  # it may never have been made


def _require_complete(upload: Upload) -> None:
    if upload.status != "complete":
        raise Conflict(
            f"The upload has {upload.received_bytes:,} of {upload.length_bytes:,} bytes. Finish it "
            "first.",
            code="upload_incomplete",
            param="upload_id",
        )


async def _check_name_is_free(session: AsyncSession, organization_id: str, name: str) -> None:
    """A model's name is its endpoint's, and those are unique in the box."""
    other = select(Model.id).where(Model.name == name, Model.organization_id != organization_id)
    if await session.scalar(other.limit(1)):
        raise Conflict(
            f"The name {name!r} is taken on this box. Choose another.",
            code="name_taken",
            param="name",
        )


async def _locked_model(session: AsyncSession, organization_id: str, name: str) -> Model:
    """The model, made if need be; locked, so that version numbers are given out one at a time."""
    try:
        async with session.begin_nested():
            if await session.scalar(_model(organization_id, name)) is None:
                session.add(
                    Model(
                        id=new_id("model"),
                        organization_id=organization_id,
                        name=name,
                        created_at=clock.now(),
                    )
                )
                await session.flush()
    except IntegrityError:
        pass  # another transaction has just made it
    model = await session.scalar(_model(organization_id, name).with_for_update())
    assert model is not None, "made above"
    return model


def _model(organization_id: str, name: str) -> Select[Model]:
    return select(Model).where(Model.organization_id == organization_id, Model.name == name)


def _no_such_model(name: str) -> NotFound:
    return NotFound(f"There is no model {name[:80]!r}.", code="model_not_found")
