"""Faster forms over HTTP: look for them again, stop looking, and what was tried."""

from typing import Any

from litestar import Request, Router, get, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath

from app.api.auth import allowed, authenticated, dependencies
from app.api.model_view import VersionState, read_version
from app.core.database import Database
from app.core.errors import Conflict
from app.deployments.optimiser import Optimiser
from app.organizations.principal import Principal
from app.registry import service as registry

AnyRequest = Request[object, object, State]


@post(
    "/models/{name:str}/versions/{number:int}/optimise",
    guards=[allowed("write")],
    status_code=202,
    summary="Look for a faster form",
)
async def optimise(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    name: FromPath[str],
    number: FromPath[int],
) -> VersionState:
    """Measures every form of a tensor model or an embedder on this box, again if it was done
    before, while the endpoint goes on answering; the one that wins takes over. 409 if that is
    under way already."""
    optimiser: Optimiser = request.app.state.optimiser
    await optimiser.ask(await _version_id(request, principal, name, number))
    return await _read(request, principal, name, number)


@post(
    "/models/{name:str}/versions/{number:int}/optimise/cancel",
    guards=[allowed("write")],
    status_code=202,
    summary="Stop looking for a faster form",
)
async def cancel_optimisation(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    name: FromPath[str],
    number: FromPath[int],
) -> VersionState:
    """What serves is left as it is. 409 if nothing is under way."""
    optimiser: Optimiser = request.app.state.optimiser
    await optimiser.cancel(await _version_id(request, principal, name, number))
    return await _read(request, principal, name, number)


@get(
    "/models/{name:str}/versions/{number:int}/receipt",
    guards=[allowed("read")],
    summary="Show a version's receipt",
)
async def show_receipt(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    name: FromPath[str],
    number: FromPath[int],
) -> dict[str, Any]:
    """What its build proved, and every form that was measured: times and throughput by batch size,
    memory, error, and why it won or lost. 409 before it is built."""
    database: Database = request.app.state.database
    async with database.read() as session:
        version = await registry.get_version(session, principal.organization_id, name, number)
    if version.receipt is None:
        raise Conflict(f"{name}@{number} is not built yet.", code="not_built")
    return version.receipt


async def _version_id(request: AnyRequest, principal: Principal, name: str, number: int) -> str:
    database: Database = request.app.state.database
    async with database.read() as session:
        version = await registry.get_version(session, principal.organization_id, name, number)
    return version.id


async def _read(request: AnyRequest, principal: Principal, name: str, number: int) -> VersionState:
    state = request.app.state
    database: Database = state.database
    async with database.read() as session:
        return await read_version(session, state.fleet, principal, name, number)


router = Router(
    "/api",
    route_handlers=[optimise, cancel_optimisation, show_receipt],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Models"],
)
