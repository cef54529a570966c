"""The model that the operator recommends, over HTTP: what `default` calls, and why."""

from datetime import datetime

import msgspec
from litestar import Request, Router, delete, get, put
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import JSONBody

from app.api.auth import allowed, authenticated, dependencies
from app.api.writing import writing
from app.core.database import Database
from app.core.errors import NotFound
from app.deployments import default_model
from app.deployments.service import CHANGED
from app.organizations.principal import Principal

AnyRequest = Request[object, object, State]


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """`model` is what a request that names `default` is answered by, and is billed for. Unless
    `is_public`, only the operator's own organization can call it."""

    model: str
    owned_by: str
    note: str
    since: datetime | None
    is_public: bool
    is_stopped: bool


class NewRecommendation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`model` is an endpoint of yours, or a published one; `note` says why, to everybody."""

    model: str
    note: str = ""


@get("/default-model", summary="Show the recommended model")
async def show_default(
    request: AnyRequest, principal: NamedDependency[Principal]
) -> Recommendation:
    """What `default` means when you call it. 404 where the operator recommends nothing that you
    can call."""
    database: Database = request.app.state.database
    async with database.read() as session:
        found = await default_model.find_default(session, principal.organization_id)
    if found is None:
        raise NotFound(
            "The operator of this box recommends no model that you can call.",
            code="no_default_model",
        )
    return _shown(found)


@put(
    "/default-model",
    guards=[allowed("admin")],
    summary="Recommend a model (operator)",
)
async def choose_default(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    data: JSONBody[NewRecommendation],
) -> Recommendation:
    """In force from the next request on."""
    principal.require_operator()
    async with writing(request, principal, "admin", operator=True) as session:
        chosen = await default_model.choose_default(
            session, principal.organization_id, data.model, data.note
        )
    request.app.state.broadcast.publish(CHANGED)
    return _shown(chosen)


@delete(
    "/default-model",
    guards=[allowed("admin")],
    summary="Recommend nothing (operator)",
)
async def end_default(request: AnyRequest, principal: NamedDependency[Principal]) -> None:
    """Calls of `default` answer 404 from then on."""
    principal.require_operator()
    async with writing(request, principal, "admin", operator=True) as session:
        await default_model.end_default(session)
    request.app.state.broadcast.publish(CHANGED)


def _shown(found: default_model.DefaultModel) -> Recommendation:
    return Recommendation(
        model=found.name,
        owned_by=found.organization_name,
        note=found.note,
        since=found.since,
        is_public=found.is_public,
        is_stopped=found.is_stopped,
    )


router = Router(
    "/api",
    route_handlers=[show_default, choose_default, end_default],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Deployments"],
)
