"""The routes of OpenAI's API: models, completions and chat completions; embeddings and responses
are answered by their own modules."""

from typing import Any

from litestar import Request, Response, Router, get, post
from litestar.params import FromPath
from litestar.response.base import ASGIResponse
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.answering import respond
from app.api.auth import bearer_principal
from app.api.chat import ChatDialect
from app.api.completions import CompletionsDialect
from app.api.embeddings import create_embeddings
from app.api.openai_types import Model, ModelList
from app.api.request_ids import exception_handlers
from app.api.responses import count_input_tokens, create_response
from app.core.database import Database
from app.core.errors import Forbidden, NotFound
from app.deployments.default_model import find_default
from app.deployments.fleet import DEFAULT_NAME
from app.deployments.tables import Endpoint
from app.organizations.principal import Principal
from app.organizations.tables import Organization

AnyRequest = Request[Any, Any, Any]


@post("/completions", status_code=200, summary="Create a completion")
async def create_completion(request: AnyRequest) -> ASGIResponse:
    """OpenAI's text completions; a prompt may be text or token ids."""
    return await respond(request, CompletionsDialect)


@post("/chat/completions", status_code=200, summary="Create a chat completion")
async def create_chat_completion(request: AnyRequest) -> ASGIResponse:
    """OpenAI's chat completions, at once or as a stream."""
    return await respond(request, ChatDialect)


@get("/models", summary="List models")
async def list_models(request: AnyRequest) -> Response[ModelList]:
    """The endpoints this key may call."""
    principal = await _reader(request)
    database: Database = request.app.state.database
    async with database.read() as session:
        return Response(ModelList(await visible_models(session, principal)))


@get("/models/{name:str}", summary="Retrieve a model")
async def retrieve_model(request: AnyRequest, name: FromPath[str]) -> Response[Model]:
    """One endpoint this key may call; `default` is the one that the operator recommends."""
    principal = await _reader(request)
    database: Database = request.app.state.database
    async with database.read() as session:
        if name == DEFAULT_NAME:
            recommended = await find_default(session, principal.organization_id)
            name = recommended.name if recommended is not None else name
        for model in await visible_models(session, principal):
            if model.id == name:
                return Response(model)
    raise NotFound(f"The model {name!r} does not exist.", param="model", code="model_not_found")


async def _reader(request: AnyRequest) -> Principal:
    """Whoever may call models or read about them may list them."""
    principal = await bearer_principal(request)
    if not principal.scopes & {"inference", "read"}:
        raise Forbidden("This API key may not list models.", code="missing_scope")
    return principal


async def visible_models(session: AsyncSession, principal: Principal) -> list[Model]:
    """Endpoints of the caller's organization and published ones, by name."""
    rows = await session.execute(
        select(Endpoint.name, Endpoint.created_at, Organization.name)
        .join(Organization, Organization.id == Endpoint.organization_id)
        .where(or_(Endpoint.organization_id == principal.organization_id, Endpoint.is_public))
        .order_by(Endpoint.name)
    )
    return [Model(name, int(created_at.timestamp()), owner) for name, created_at, owner in rows]


router = Router(
    "/v1",
    route_handlers=[
        create_completion,
        create_chat_completion,
        create_response,
        count_input_tokens,
        create_embeddings,
        list_models,
        retrieve_model,
    ],
    exception_handlers=exception_handlers,
    tags=["OpenAI"],
)
