"""Deployments and endpoints over HTTP: what serves, stop and start, roll back, publish."""

import asyncio
from datetime import datetime

import msgspec
from litestar import Request, Response, Router, get, patch, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import UNSET, UnsetType

from app.api.auth import allowed, authenticated, dependencies
from app.api.writing import writing
from app.billing.key_limits import confirm
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.core.storage import Storage
from app.deployments import service
from app.deployments.logs import read_log, replica_log_name
from app.deployments.service import EndpointState
from app.organizations.principal import Principal

AnyRequest = Request[object, object, State]


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    version: int | None
    status: str
    detail: str
    memory_bytes: int
    created_at: datetime
    ready_at: datetime | None
    stopped_at: datetime | None


class DeploymentState(msgspec.Struct, frozen=True, kw_only=True):
    """`version` and `revision` are the desired ones, `serving` the settings that differ from the
    box's; `replicas`, newest first, are what there is, recent ones that ended included."""

    endpoint: str
    model: str
    is_public: bool
    is_default: bool
    is_stopped: bool
    version: int
    revision: int
    num_replicas: int
    serving: dict[str, int | float]
    replicas: list[ReplicaState]


class DeploymentList(msgspec.Struct, frozen=True):
    deployments: list[DeploymentState]


class RevisionState(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    version: int
    num_replicas: int
    serving: dict[str, int | float]
    created_at: datetime


class RevisionList(msgspec.Struct, frozen=True):
    revisions: list[RevisionState]


class Rollback(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Without a revision: to the one before the present one."""

    revision: int | None = None


class EndpointChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`is_public` opens an endpoint to every organization of the box; `is_default` makes it what
    `model: default` means, which is the operator's to say."""

    is_public: bool | UnsetType = UNSET
    is_default: bool | UnsetType = UNSET


class DeploymentChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is not given stays; null takes a serving setting back to the box's default.
    `latency_target_ms` is how long a request may take in the worker: rows wait for company only
    within it, and 0 lets none wait."""

    num_replicas: int | UnsetType = UNSET
    latency_target_ms: float | UnsetType | None = UNSET
    max_batch_rows: int | UnsetType | None = UNSET
    max_batch_tokens: int | UnsetType | None = UNSET
    max_sequences: int | UnsetType | None = UNSET
    max_waiting: int | UnsetType | None = UNSET
    kv_cache_bytes: int | UnsetType | None = UNSET


@get("/deployments", guards=[allowed("read")], summary="List deployments")
async def list_deployments(
    request: AnyRequest, principal: NamedDependency[Principal]
) -> DeploymentList:
    """Your organization's endpoints with their replicas, by name."""
    database: Database = request.app.state.database
    async with database.read() as session:
        states = await service.list_endpoints(session, principal.organization_id)
    return DeploymentList([_shown(state) for state in states])


@get("/deployments/{endpoint:str}", guards=[allowed("read")], summary="Show a deployment")
async def show_deployment(
    request: AnyRequest, principal: NamedDependency[Principal], endpoint: FromPath[str]
) -> DeploymentState:
    """One endpoint with its replicas."""
    return await _read(request, principal, endpoint)


@get("/deployments/{endpoint:str}/revisions", guards=[allowed("read")], summary="List revisions")
async def list_revisions(
    request: AnyRequest, principal: NamedDependency[Principal], endpoint: FromPath[str]
) -> RevisionList:
    """What a rollback can go to, newest first."""
    database: Database = request.app.state.database
    async with database.read() as session:
        rows = await service.list_revisions(session, principal.organization_id, endpoint)
    return RevisionList(
        [
            RevisionState(
                number=revision.number,
                version=version.number,
                num_replicas=revision.num_replicas,
                serving=revision.serving,
                created_at=revision.created_at,
            )
            for revision, version in rows
        ]
    )


@patch("/deployments/{endpoint:str}", guards=[allowed("write")], summary="Change how it serves")
async def change_deployment(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    endpoint: FromPath[str],
    data: JSONBody[DeploymentChange],
) -> DeploymentState:
    """Makes a new revision with these settings, which takes over without a break."""
    given = {
        name: value
        for name, value in msgspec.structs.asdict(data).items()
        if value is not UNSET and name != "num_replicas"
    }
    if not given and data.num_replicas is UNSET:
        raise InvalidRequest("Give at least one setting to change.")
    async with writing(request, principal, "write") as session:
        await service.change_settings(
            session,
            principal.organization_id,
            endpoint,
            num_replicas=None if data.num_replicas is UNSET else data.num_replicas,
            serving=given,
        )
    return await _changed(request, principal, endpoint)


@post(
    "/deployments/{endpoint:str}/stop",
    guards=[allowed("write")],
    status_code=202,
    summary="Stop a deployment",
)
async def stop(
    request: AnyRequest, principal: NamedDependency[Principal], endpoint: FromPath[str]
) -> DeploymentState:
    """Lets running requests finish; calls answer 503 until a start."""
    async with writing(request, principal, "write") as session:
        await service.stop_deployment(session, principal.organization_id, endpoint)
    return await _changed(request, principal, endpoint)


@post(
    "/deployments/{endpoint:str}/start",
    guards=[allowed("write")],
    status_code=202,
    summary="Start a deployment",
)
async def start(
    request: AnyRequest, principal: NamedDependency[Principal], endpoint: FromPath[str]
) -> DeploymentState:
    """Starts what was stopped."""
    async with writing(request, principal, "write") as session:
        await service.start_deployment(session, principal.organization_id, endpoint)
    return await _changed(request, principal, endpoint)


@post(
    "/deployments/{endpoint:str}/rollback",
    guards=[allowed("write")],
    status_code=202,
    summary="Roll back a deployment",
)
async def roll_back(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    endpoint: FromPath[str],
    data: JSONBody[Rollback | None] = None,
) -> DeploymentState:
    """Goes back to an earlier revision; later ones stay."""
    number = data.revision if data else None
    async with writing(request, principal, "write") as session:
        await service.roll_back(session, principal.organization_id, endpoint, number)
    return await _changed(request, principal, endpoint)


@get(
    "/deployments/{endpoint:str}/log",
    guards=[allowed("read")],
    media_type="text/plain",
    summary="Read a worker's log",
)
async def show_log(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    endpoint: FromPath[str],
    offset: FromQuery[int] = 0,
) -> Response[str]:
    """Of the newest replica, from a byte offset on (negative: from the end); `X-Next-Offset` is
    where to go on, and `X-Replica` tells whose log it is."""
    database: Database = request.app.state.database
    storage: Storage = request.app.state.storage
    async with database.read() as session:
        state = await service.get_endpoint(session, principal.organization_id, endpoint)
    if not state.replicas:
        return Response("", headers={"X-Next-Offset": "0"})
    replica_id = state.replicas[0].id
    part = await asyncio.to_thread(read_log, storage.log(replica_log_name(replica_id)), offset)
    headers = {"X-Next-Offset": str(part.next_offset), "X-Replica": replica_id}
    return Response(part.text, headers=headers)


@patch("/endpoints/{endpoint:str}", guards=[allowed("write")], summary="Publish an endpoint")
async def change_endpoint(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    endpoint: FromPath[str],
    data: JSONBody[EndpointChange],
) -> DeploymentState:
    """Sets what is given and leaves the rest."""
    if data.is_public is UNSET and data.is_default is UNSET:
        raise InvalidRequest("Give is_public, is_default or both.")
    organization_id = principal.organization_id
    async with writing(request, principal, "write") as session:
        await service.find_endpoint(session, organization_id, endpoint)
        if data.is_default is not UNSET:
            await confirm(session, principal, "admin", operator=True)
            await service.set_endpoint_default(session, organization_id, endpoint, data.is_default)
        if data.is_public is not UNSET:
            await service.set_endpoint_public(session, organization_id, endpoint, data.is_public)
    return await _changed(request, principal, endpoint)


async def _changed(request: AnyRequest, principal: Principal, endpoint: str) -> DeploymentState:
    """Tells the reconciler, and answers with the new state."""
    request.app.state.broadcast.publish(service.CHANGED)
    return await _read(request, principal, endpoint)


async def _read(request: AnyRequest, principal: Principal, endpoint: str) -> DeploymentState:
    database: Database = request.app.state.database
    async with database.read() as session:
        return _shown(await service.get_endpoint(session, principal.organization_id, endpoint))


def _shown(state: EndpointState) -> DeploymentState:
    version = state.version
    return DeploymentState(
        endpoint=state.endpoint.name,
        model=state.model.name,
        is_public=state.endpoint.is_public,
        is_default=state.endpoint.is_default,
        is_stopped=state.deployment.is_stopped,
        version=version.number,
        revision=state.revision.number,
        num_replicas=state.revision.num_replicas,
        serving=state.revision.serving,
        replicas=[
            ReplicaState(
                id=replica.id,
                version=version.number if replica.version_id == version.id else None,
                status=replica.status,
                detail=replica.detail,
                memory_bytes=replica.memory_bytes,
                created_at=replica.created_at,
                ready_at=replica.ready_at,
                stopped_at=replica.stopped_at,
            )
            for replica in state.replicas
        ],
    )


router = Router(
    "/api",
    route_handlers=[
        list_deployments,
        show_deployment,
        list_revisions,
        change_deployment,
        stop,
        start,
        roll_back,
        show_log,
        change_endpoint,
    ],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Deployments"],
)
