"""Desired state: deployments, their revisions and endpoints. Every verb takes an open session.

What runs is brought in line with it by `reconciler.py`, which looks once a second and at once when
`CHANGED` is published. Call that after the commit.
"""

import msgspec
from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.clock import now
from app.core.errors import Conflict, InvalidRequest, NotFound
from app.core.ids import new_id
from app.deployments.tables import Deployment, Endpoint, Replica, Revision
from app.registry.tables import Model, ModelVersion
from runtime.protocol import Serve

CHANGED = "deployments"  # Broadcast topic: desired state or replicas changed

# What a revision may override of `Serve`; the rest is the box's.
SERVING_FIELDS = frozenset(
    {
        "kv_cache_bytes",
        "max_batch_tokens",
        "max_sequences",
        "max_waiting",
        "max_batch_rows",
        "latency_target_ms",
    }
)
MAX_REPLICAS = 64


class EndpointState(msgspec.Struct, frozen=True):
    """An endpoint with everything that says how it does. `version` is the desired one; `replicas`
    are newest first and include recent ones that ended."""

    endpoint: Endpoint
    deployment: Deployment
    model: Model
    revision: Revision
    version: ModelVersion
    replicas: list[Replica]


async def deploy_version(
    session: AsyncSession,
    version: ModelVersion,
    *,
    num_replicas: int | None = None,
    serving: dict[str, int | float] | None = None,
) -> Endpoint:
    """Makes `version` what its model's endpoint serves, creating deployment and endpoint (named
    like the model) at first. Settings not given are those of the revision before. Raises
    `Conflict` when the name belongs to someone else or the version is not ready."""
    if version.status != "ready":
        raise Conflict(f"Version {version.number} is {version.status}; only a ready one can serve.")
    model = await session.get_one(Model, version.model_id)
    found = await session.execute(select(Deployment).where(Deployment.model_id == model.id))
    deployment = found.scalar_one_or_none()
    if deployment is None:
        deployment, endpoint = await _create_deployment(session, model)
    else:
        found = await session.execute(
            select(Endpoint).where(Endpoint.deployment_id == deployment.id)
        )
        endpoint = found.scalar_one()
    before = await session.get(Revision, deployment.revision_id) if deployment.revision_id else None
    settings = before.serving if before else {}
    await _add_revision(
        session,
        deployment,
        version.id,
        num_replicas=num_replicas or (before.num_replicas if before else 1),
        serving=serving if serving is not None else settings,
    )
    deployment.is_stopped = False
    return endpoint


async def change_settings(
    session: AsyncSession,
    organization_id: str,
    name: str,
    *,
    num_replicas: int | None = None,
    serving: dict[str, int | float | None],
) -> Revision:
    """A new revision of the version that is served, with these settings and, for those that are
    not given, the present ones; None takes one back to the box's default. Raises `NotFound` and
    `InvalidRequest`."""
    endpoint = await find_endpoint(session, organization_id, name)
    deployment = await session.get_one(
        Deployment, endpoint.deployment_id, with_for_update=True, populate_existing=True
    )
    before = await session.get(Revision, deployment.revision_id) if deployment.revision_id else None
    if before is None:
        raise Conflict(f"{name!r} serves no version yet.", code="no_revision")
    merged = {**before.serving, **serving}
    return await _add_revision(
        session,
        deployment,
        before.version_id,
        num_replicas=before.num_replicas if num_replicas is None else num_replicas,
        serving={key: value for key, value in merged.items() if value is not None},
    )


async def _add_revision(
    session: AsyncSession,
    deployment: Deployment,
    version_id: str,
    *,
    num_replicas: int,
    serving: dict[str, int | float],
) -> Revision:
    """The deployment's next one, in force."""
    last = await session.scalar(
        select(func.max(Revision.number)).where(Revision.deployment_id == deployment.id)
    )
    revision = Revision(
        id=new_id("rev"),
        deployment_id=deployment.id,
        number=(last or 0) + 1,
        version_id=version_id,
        num_replicas=check_num_replicas(num_replicas),
        serving=check_serving(serving),
        created_at=now(),
    )
    session.add(revision)
    deployment.revision_id = revision.id
    await session.flush()
    return revision


async def _create_deployment(session: AsyncSession, model: Model) -> tuple[Deployment, Endpoint]:
    deployment = Deployment(
        id=new_id("dep"),
        organization_id=model.organization_id,
        model_id=model.id,
        is_stopped=False,
        created_at=now(),
    )
    endpoint = Endpoint(
        id=new_id("ep"),
        name=model.name,
        organization_id=model.organization_id,
        deployment_id=deployment.id,
        created_at=now(),
    )
    try:
        async with session.begin_nested():
            session.add(deployment)
            await session.flush()
            session.add(endpoint)
    except IntegrityError:
        raise Conflict(
            f"Another organization already has an endpoint named {model.name!r}. "
            "Upload the model under another name.",
            code="endpoint_name_taken",
            param="name",
        ) from None
    return deployment, endpoint


def check_num_replicas(num_replicas: int) -> int:
    if not 1 <= num_replicas <= MAX_REPLICAS:
        raise InvalidRequest(
            f"num_replicas must be between 1 and {MAX_REPLICAS}.", param="num_replicas"
        )
    return num_replicas


def check_serving(serving: dict[str, int | float]) -> dict[str, int | float]:
    """Raises `InvalidRequest` naming the first setting that cannot be used."""
    for name, value in serving.items():
        if name not in SERVING_FIELDS:
            raise InvalidRequest(
                f"{name!r} is not a serving setting. There are: "
                f"{', '.join(sorted(SERVING_FIELDS))}.",
                param=f"serving.{name}",
            )
        if value < 0 or (value == 0 and name != "latency_target_ms"):
            raise InvalidRequest(f"{name} must be positive.", param=f"serving.{name}")
    try:
        msgspec.convert({"artifact_dir": "", "type": "serve", **serving}, Serve)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"A serving setting is wrong: {error}.", param="serving") from None
    return serving


async def find_endpoint(session: AsyncSession, organization_id: str, name: str) -> Endpoint:
    """Raises `NotFound`; another organization's endpoint is not found either."""
    found = await session.execute(
        select(Endpoint).where(Endpoint.name == name, Endpoint.organization_id == organization_id)
    )
    endpoint = found.scalar_one_or_none()
    if endpoint is None:
        raise NotFound(f"You have no endpoint named {name!r}.", param="endpoint")
    return endpoint


async def list_endpoints(session: AsyncSession, organization_id: str) -> list[EndpointState]:
    """The organization's endpoints by name."""
    return await _states(session, Endpoint.organization_id == organization_id)


async def get_endpoint(session: AsyncSession, organization_id: str, name: str) -> EndpointState:
    """Raises `NotFound`."""
    endpoint = await find_endpoint(session, organization_id, name)
    (state,) = await _states(session, Endpoint.id == endpoint.id)
    return state


async def _states(session: AsyncSession, condition: ColumnElement[bool]) -> list[EndpointState]:
    rows = await session.execute(
        select(Endpoint, Deployment, Model, Revision, ModelVersion)
        .join(Deployment, Deployment.id == Endpoint.deployment_id)
        .join(Model, Model.id == Deployment.model_id)
        .join(Revision, Revision.id == Deployment.revision_id)
        .join(ModelVersion, ModelVersion.id == Revision.version_id)
        .where(condition)
        .order_by(Endpoint.name)
    )
    found = rows.all()
    replicas: dict[str, list[Replica]] = {deployment.id: [] for _, deployment, _, _, _ in found}
    rows = await session.execute(
        select(Replica)
        .where(Replica.deployment_id.in_(replicas))
        .order_by(Replica.created_at.desc(), Replica.id.desc())
    )
    for replica in rows.scalars():
        replicas[replica.deployment_id].append(replica)
    return [
        EndpointState(endpoint, deployment, model, revision, version, replicas[deployment.id])
        for endpoint, deployment, model, revision, version in found
    ]


async def list_revisions(
    session: AsyncSession, organization_id: str, name: str
) -> list[tuple[Revision, ModelVersion]]:
    """Newest first: what a rollback can go to."""
    endpoint = await find_endpoint(session, organization_id, name)
    rows = await session.execute(
        select(Revision, ModelVersion)
        .join(ModelVersion, ModelVersion.id == Revision.version_id)
        .where(Revision.deployment_id == endpoint.deployment_id)
        .order_by(Revision.number.desc())
    )
    return [(revision, version) for revision, version in rows]


async def set_endpoint_public(
    session: AsyncSession, organization_id: str, name: str, is_public: bool
) -> Endpoint:
    """Publishes an endpoint to every organization of the box, or takes that back."""
    endpoint = await find_endpoint(session, organization_id, name)
    endpoint.is_public = is_public
    return endpoint


async def set_endpoint_default(
    session: AsyncSession, organization_id: str, name: str, is_default: bool
) -> Endpoint:
    """What `model: default` means, without a reason (`default_model` gives one). There is one in
    the box, so this is the operator's to do: the caller checks that."""
    endpoint = await find_endpoint(session, organization_id, name)
    if is_default:
        await session.execute(update(Endpoint).values(is_default=False))
    endpoint.is_default, endpoint.default_note = is_default, ""
    endpoint.default_since = now() if is_default else None
    return endpoint


async def stop_deployment(session: AsyncSession, organization_id: str, name: str) -> Endpoint:
    """Lets running requests finish, then ends the replicas. Calls answer 503 until a start."""
    return await _set_stopped(session, organization_id, name, True)


async def start_deployment(session: AsyncSession, organization_id: str, name: str) -> Endpoint:
    return await _set_stopped(session, organization_id, name, False)


async def _set_stopped(
    session: AsyncSession, organization_id: str, name: str, is_stopped: bool
) -> Endpoint:
    endpoint = await find_endpoint(session, organization_id, name)
    deployment = await session.get_one(Deployment, endpoint.deployment_id)
    deployment.is_stopped = is_stopped
    return endpoint


async def roll_back(
    session: AsyncSession, organization_id: str, name: str, revision_number: int | None = None
) -> Revision:
    """Goes back to a revision: the one before the present one if none is named. Nothing is lost;
    the later revisions stay and can be gone to the same way."""
    revisions = await list_revisions(session, organization_id, name)
    endpoint = await find_endpoint(session, organization_id, name)
    deployment = await session.get_one(Deployment, endpoint.deployment_id)
    if revision_number is not None:
        chosen = [row for row, _ in revisions if row.number == revision_number]
        missing = f"{name!r} has no revision {revision_number}."
    else:
        present = next((r.number for r, _ in revisions if r.id == deployment.revision_id), 0)
        chosen = [row for row, _ in revisions if row.number < present]
        missing = f"{name!r} has no earlier revision to go back to."
    if not chosen:
        raise Conflict(missing, code="no_revision", param="revision")
    deployment.revision_id = chosen[0].id
    deployment.is_stopped = False
    return chosen[0]
