"""The routes of OpenAI's API: models, completions and chat completions; and embeddings,
which `embeddings.py` answers."""

from typing import Any

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.params import FromPath
from litestar.response.base import ASGIResponse
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.auth import bearer_principal
from app.api.bodies import decode
from app.api.call import Call
from app.api.chat import ChatDialect
from app.api.completions import CompletionsDialect
from app.api.dialect import Dialect, usage_of
from app.api.embeddings import create_embeddings
from app.api.openai_types import Model, ModelList
from app.api.relay import Relay
from app.api.request_ids import exception_handlers, new_request_id
from app.api.streaming import CancelledOnDisconnect, EventStream
from app.core.database import Database
from app.core.errors import Forbidden, InvalidRequest, NotFound
from app.core.security import derive_key
from app.deployments.tables import Endpoint
from app.organizations.principal import Principal
from app.organizations.tables import Organization

AnyRequest = Request[Any, Any, Any]
_encoder = msgspec.json.Encoder()


@post("/completions", status_code=200, summary="Create a completion")
async def create_completion(request: AnyRequest) -> ASGIResponse:
    """OpenAI's text completions; a prompt may be text or token ids."""
    return await respond(request, CompletionsDialect)


@post("/chat/completions", status_code=200, summary="Create a chat completion")
async def create_chat_completion(request: AnyRequest) -> ASGIResponse:
    """OpenAI's chat completions, at once or as a stream."""
    return await respond(request, ChatDialect)


async def respond(request: AnyRequest, dialect_class: type[Dialect[Any]]) -> ASGIResponse:
    """Authenticates, decodes, runs and answers. A stream begins with its first output, so that
    whatever goes wrong before still has an HTTP status."""
    request_id = new_request_id(request)
    principal = await bearer_principal(request)
    principal.require("inference")
    body = decode(dialect_class.decoder, await request.body())
    dialect = dialect_class(body, principal, request_id)
    state = request.app.state
    target = state.fleet.resolve(principal, body.model)
    decoder = target.manifest.decoder
    if decoder is None:
        is_embedder = target.manifest.kind == "embedder"
        route = "/v1/embeddings" if is_embedder else f"/models/{body.model}/predict"
        raise InvalidRequest(
            f"{body.model!r} does not generate text; call POST {route}.",
            param="model",
            code="wrong_kind_of_model",
        )
    relay: Relay = state.relay
    call = Call(
        principal=principal,
        target=target,
        route=dialect.route,
        service_class=dialect.service_class,
        is_stream=dialect.is_stream,
        request_id=request_id,
    )
    # A worker runs somebody's model: it learns a key of this version, not the tenant's own.
    cache_salt = derive_key(principal.cache_salt, "prefix cache", target.version_id)
    execution = relay.generate(call, dialect.generate(decoder, cache_salt))
    with CancelledOnDisconnect(request.receive, execution):
        await execution.started
        if dialect.is_stream:
            return EventStream(execution, dialect, await execution.next_outputs())
        outputs = await execution.all_outputs()
    answer = dialect.answer(outputs, usage_of(execution.tally))
    return ASGIResponse(body=_encoder.encode(answer), headers={"x-request-id": request_id})


@get("/models", summary="List models")
async def list_models(request: AnyRequest) -> Response[ModelList]:
    """The endpoints this key may call."""
    principal = await _reader(request)
    database: Database = request.app.state.database
    async with database.read() as session:
        return Response(ModelList(await visible_models(session, principal)))


@get("/models/{name:str}", summary="Retrieve a model")
async def retrieve_model(request: AnyRequest, name: FromPath[str]) -> Response[Model]:
    """One endpoint this key may call."""
    principal = await _reader(request)
    database: Database = request.app.state.database
    async with database.read() as session:
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
        create_embeddings,
        list_models,
        retrieve_model,
    ],
    exception_handlers=exception_handlers,
    tags=["OpenAI"],
)
