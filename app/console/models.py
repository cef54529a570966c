"""The list of models, a model's page, and what can be done there: cancel, stop, start, publish,
serve another version, delete."""

import asyncio
from typing import Annotated, Any

from litestar import Response, Router, get, post
from litestar.params import FromPath, FromQuery, QueryParameter

from app.api.writing import writing
from app.console.live import model_events, model_parts, seen_mark
from app.console.model_view import read_model
from app.console.models_view import read_models
from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, base_url, page
from app.core.broadcast import Broadcast
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.core.storage import Storage
from app.deployments import service as deployments
from app.deployments.builder import Builder
from app.deployments.logs import build_log_name, read_log
from app.registry import service as registry

MAX_LOG_BYTES = 4 * 1024**2
MAX_DIGITS = 9  # of the number of a version
MAX_SEARCH = 64  # characters, as long as a name


@get("/models")
async def show_models(
    request: PageRequest,
    q: FromQuery[str] = "",
    number: Annotated[int, QueryParameter(name="page", required=False)] = 1,
) -> Response[str]:
    """The organization's models, those whose names hold `q`, or how to get the first one."""
    database: Database = request.app.state.database
    organization_id = signed_in(request).principal.organization_id
    async with database.read() as session:
        shown = await read_models(session, organization_id, q.strip()[:MAX_SEARCH], number)
    return page(request, "models/list.html", shown=shown, base_url=base_url(request))


@get("/models/{name:str}")
async def show_model(request: PageRequest, name: FromPath[str]) -> Response[str]:
    """A model's newest version."""
    return await _model_page(request, name, None)


@get("/models/{name:str}/versions/{number:int}")
async def show_version(
    request: PageRequest, name: FromPath[str], number: FromPath[int]
) -> Response[str]:
    """A model's page about one of its versions."""
    return await _model_page(request, name, number)


async def _model_page(request: PageRequest, name: str, number: int | None) -> Response[str]:
    person = signed_in(request)
    person.principal.require("read")
    database: Database = request.app.state.database
    async with database.read() as session:
        view = await read_model(session, person.principal.organization_id, name, number)
    storage: Storage = request.app.state.storage
    parts = await model_parts(view, storage, person.csrf_token, base_url(request))
    events_url = (
        f"/console/models/{name}/versions/{view.shown.number}/events?seen={seen_mark(parts)}"
    )
    return page(request, "models/model.html", view=view, parts=parts, events_url=events_url)


@get("/models/{name:str}/versions/{number:int}/log")
async def show_log(
    request: PageRequest, name: FromPath[str], number: FromPath[int]
) -> Response[str]:
    """A build's whole log (its end, if it is very long) as plain text."""
    principal = signed_in(request).principal
    principal.require("read")
    database: Database = request.app.state.database
    async with database.read() as session:
        view = await read_model(session, principal.organization_id, name, number)
    storage: Storage = request.app.state.storage
    path = storage.log(build_log_name(view.shown.id))
    log = await asyncio.to_thread(read_log, path, -MAX_LOG_BYTES, MAX_LOG_BYTES)
    return Response(log.text, media_type="text/plain; charset=utf-8")


# --- actions ----------------------------------------------------------------------------


@post("/models/{name:str}/versions/{number:int}/cancel", status_code=200)
async def cancel_build(
    request: PageRequest, name: FromPath[str], number: FromPath[int]
) -> Response[Any]:
    """Ends a build that waits or runs."""
    principal = signed_in(request).principal
    principal.require("write")
    database: Database = request.app.state.database
    async with database.read() as session:
        version = await registry.get_version(session, principal.organization_id, name, number)
    builder: Builder = request.app.state.builder
    await builder.cancel(version.id)
    return go(request, f"/console/models/{name}/versions/{number}?notice=cancelled")


@post("/models/{name:str}/endpoint/{verb:str}", status_code=200)
async def change_endpoint(
    request: PageRequest, name: FromPath[str], verb: FromPath[str]
) -> Response[Any]:
    """Stops, starts, publishes or takes back an endpoint, or serves another version."""
    principal = signed_in(request).principal
    principal.require("write")
    organization_id = principal.organization_id
    async with writing(request, principal, "write") as session:
        match verb:
            case "stop":
                await deployments.stop_deployment(session, organization_id, name)
            case "start":
                await deployments.start_deployment(session, organization_id, name)
            case "publish" | "unpublish":
                is_public = verb == "publish"
                await deployments.set_endpoint_public(session, organization_id, name, is_public)
            case "rollback":
                number = await _sent_version_number(request)
                version = await registry.get_version(session, organization_id, name, number)
                await deployments.deploy_version(session, version)
            case _:
                raise InvalidRequest(f"An endpoint cannot be told to {verb!r}.")
    broadcast: Broadcast = request.app.state.broadcast
    broadcast.publish(deployments.CHANGED)
    notice = {
        "stop": "stopped", "start": "started", "publish": "published",
        "unpublish": "unpublished", "rollback": "rolled-back",
    }[verb]  # fmt: skip
    return go(request, f"/console/models/{name}?notice={notice}")


async def _sent_version_number(request: PageRequest) -> int:
    text = await form_field(request, "version")
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise InvalidRequest("Choose the version that is to be served.", param="version")
    return int(text)


@get("/models/{name:str}/delete")
async def ask_delete(request: PageRequest, name: FromPath[str]) -> Response[str]:
    """What deleting would do, and the form that does it."""
    principal = signed_in(request).principal
    principal.require("write")
    database: Database = request.app.state.database
    async with database.read() as session:
        await registry.get_model(session, principal.organization_id, name)
    return page(request, "models/delete.html", name=name, error="")


@post("/models/{name:str}/delete", status_code=200)
async def delete_model(request: PageRequest, name: FromPath[str]) -> Response[Any]:
    """Deletes a model once its name was typed."""
    principal = signed_in(request).principal
    principal.require("write")
    if (await form_field(request, "confirmation")).strip() != name:
        error = f"Type {name} exactly as it is written here, or keep the model."
        return page(request, "models/delete.html", status_code=400, name=name, error=error)
    async with writing(request, principal, "write") as session:
        removed = await registry.delete_model(session, principal.organization_id, name)
    broadcast: Broadcast = request.app.state.broadcast
    broadcast.publish(deployments.CHANGED)
    await registry.remove_files(request.app.state.storage, request.app.state.uploads, removed)
    return go(request, "/console/models?notice=deleted")


router = Router(
    "",
    route_handlers=[
        show_models,
        show_model,
        show_version,
        show_log,
        model_events,
        cancel_build,
        change_endpoint,
        ask_delete,
        delete_model,
    ],
)
