"""What a person can do about the search for a model's faster form: start it again, or stop it."""

from typing import Any

from litestar import Response, Router, post
from litestar.params import FromPath

from app.console.sessions import go, signed_in
from app.console.templating import PageRequest
from app.core.database import Database
from app.deployments.optimiser import Optimiser
from app.registry import service as registry


@post("/models/{name:str}/versions/{number:int}/optimise", status_code=200)
async def optimise(
    request: PageRequest, name: FromPath[str], number: FromPath[int]
) -> Response[Any]:
    """Queues a version, whether or not it was optimised before."""
    optimiser: Optimiser = request.app.state.optimiser
    await optimiser.ask(await _version_id(request, name, number))
    return go(request, f"/console/models/{name}/versions/{number}")


@post("/models/{name:str}/versions/{number:int}/optimise/cancel", status_code=200)
async def cancel_optimisation(
    request: PageRequest, name: FromPath[str], number: FromPath[int]
) -> Response[Any]:
    """What serves is left as it is."""
    optimiser: Optimiser = request.app.state.optimiser
    await optimiser.cancel(await _version_id(request, name, number))
    return go(request, f"/console/models/{name}/versions/{number}")


async def _version_id(request: PageRequest, name: str, number: int) -> str:
    principal = signed_in(request).principal
    principal.require("write")
    database: Database = request.app.state.database
    async with database.read() as session:
        version = await registry.get_version(session, principal.organization_id, name, number)
    return version.id


router = Router("", route_handlers=[optimise, cancel_optimisation])
