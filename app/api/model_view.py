"""How models and versions read in the management API, and whether they serve right now."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import AppError
from app.deployments import service as deployments
from app.deployments.optimisation_view import OptimisationView, read_optimisations
from app.deployments.service import EndpointState
from app.organizations.principal import Principal
from app.registry import service as registry
from app.registry.input_hints import show_inputs
from app.registry.tables import ModelVersion
from runtime.protocol import Manifest


class BuildError(msgspec.Struct, frozen=True):
    """Why a build failed. `message` says what to do."""

    code: str
    message: str


class VersionState(msgspec.Struct, frozen=True, kw_only=True):
    """`status` is `queued`, `building`, `ready`, `failed` or `cancelled`; `progress` is of the
    whole build, 0 to 1. `endpoint` is the endpoint whose desired version this is. `is_serving`:
    a call to `model@number` is answered now, in `serving_form`; if not, `serving_detail` says why.
    `manifest` and `receipt` are the build's, with the form that won; `optimisation` is how the
    search for it stands, null where there was none. `notes` are what the inspection of the upload
    found odd. `inputs` and `accepts_loss` are what its owner says of it, of which a later version
    inherits what it is not told anew; `upload_id` builds it again."""

    id: str
    model: str
    number: int
    status: str
    phase: str
    phase_detail: str
    progress: float
    error: BuildError | None
    manifest: dict[str, Any] | None
    receipt: dict[str, Any] | None
    endpoint: str | None
    is_serving: bool
    serving_detail: str
    serving_form: str
    filename: str
    upload_bytes: int
    sha256: str
    upload_id: str
    inputs: str
    accepts_loss: bool
    created_at: datetime
    finished_at: datetime | None
    optimisation: OptimisationView | None = None
    notes: list[str] = []


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """`versions` is given for a single model, newest first, and null in lists."""

    id: str
    name: str
    created_at: datetime
    latest_version: VersionState | None
    versions: list[VersionState] | None = None


class ModelList(msgspec.Struct, frozen=True):
    models: list[ModelState]


class _Target(Protocol):
    @property
    def manifest(self) -> Manifest: ...


class _Fleet(Protocol):
    def resolve(self, principal: Principal, model_name: str) -> _Target: ...


async def read_models(
    session: AsyncSession, fleet: _Fleet, principal: Principal, name: str | None = None
) -> list[ModelState]:
    """Every model of the caller's organization by name, or the one of this name in full."""
    organization_id = principal.organization_id
    states = await deployments.list_endpoints(session, organization_id)
    models: list[ModelState] = []
    summaries = await registry.list_models(session, organization_id)
    newest = [summary.latest_version for summary in summaries if summary.latest_version]
    attempts = await read_optimisations(session, newest)
    for summary in summaries:
        model, latest = summary.model, summary.latest_version
        if name not in (None, model.name):
            continue
        versions = None
        if name is not None:
            rows = await registry.list_versions(session, organization_id, name)
            attempts = await read_optimisations(session, rows)
            versions = [
                version_state(fleet, principal, name, row, states, attempts.get(row.id))
                for row in rows
            ]
        models.append(
            ModelState(
                id=model.id,
                name=model.name,
                created_at=model.created_at,
                latest_version=version_state(
                    fleet, principal, model.name, latest, states, attempts.get(latest.id)
                )
                if latest
                else None,
                versions=versions,
            )
        )
    return models


async def read_version(
    session: AsyncSession, fleet: _Fleet, principal: Principal, name: str, number: int
) -> VersionState:
    """Raises `NotFound`."""
    version = await registry.get_version(session, principal.organization_id, name, number)
    states = await deployments.list_endpoints(session, principal.organization_id)
    attempts = await read_optimisations(session, [version])
    return version_state(fleet, principal, name, version, states, attempts.get(version.id))


def version_state(
    fleet: _Fleet,
    principal: Principal,
    name: str,
    version: ModelVersion,
    states: Sequence[EndpointState],
    optimisation: OptimisationView | None,
) -> VersionState:
    """A version with what of it runs, among the organization's endpoints."""
    desired = next((state for state in states if state.version.id == version.id), None)
    form, detail = _serving(fleet, principal, name, version, desired)
    error = None
    if version.status in ("failed", "cancelled") and version.error_message:
        error = BuildError(version.error_code or version.status, version.error_message)
    hints = registry.version_hints(version)
    return VersionState(
        id=version.id,
        model=name,
        number=version.number,
        status=version.status,
        phase=version.phase,
        phase_detail=version.phase_detail,
        progress=version.progress_permille / 1000,
        error=error,
        manifest=version.manifest,
        receipt=version.receipt,
        endpoint=desired.endpoint.name if desired else None,
        is_serving=bool(form),
        serving_detail=detail,
        serving_form=form,
        filename=version.filename,
        upload_bytes=version.upload_bytes,
        sha256=version.sha256,
        upload_id=version.upload_id,
        inputs=show_inputs(hints.inputs),
        accepts_loss=hints.accepts_loss,
        created_at=version.created_at,
        finished_at=version.finished_at,
        optimisation=optimisation,
    )


def _serving(
    fleet: _Fleet,
    principal: Principal,
    name: str,
    version: ModelVersion,
    desired: EndpointState | None,
) -> tuple[str, str]:
    """The form in which calls are answered, or else why they are not. Asked of the fleet, which
    answers, and not of the rows, which say what was."""
    if version.status != "ready":
        return "", ""
    try:
        target = fleet.resolve(principal, f"{name}@{version.number}")
    except AppError as error:
        return "", _why_not(desired) or error.message
    return target.manifest.form, ""


def _why_not(desired: EndpointState | None) -> str:
    """What the newest replica of a desired version is up to."""
    if desired is None:
        return ""
    if desired.deployment.is_stopped:
        return "stopped"
    for replica in desired.replicas:
        if replica.version_id == desired.version.id:
            return f"{replica.status}: {replica.detail}" if replica.detail else replica.status
    return "starting"
