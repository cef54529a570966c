"""The routes of the Open Inference Protocol, version 2, over HTTP, as KServe and Triton clients
speak it.

Requests are read in `inference_v2_requests.py`, answered in `inference_v2_answers.py`; a
prediction runs and is metered like any other. What needs a shared machine (shared memory, traces,
logs) or another way to deploy (load, unload) is refused with 501.
"""

from typing import Any, cast

import msgspec
from litestar import Request, Router, get, post, route
from litestar.params import FromPath
from litestar.response.base import ASGIResponse

from app.api.auth import bearer_principal, caller_and_body
from app.api.bodies import decode, holding_body, receive_small_body
from app.api.compression import MIN_PACKED_BYTES, accepted_encoding, packed
from app.api.health import problem_of
from app.api.inference_v2_answers import check_answer_values, infer_answer
from app.api.inference_v2_models import (
    IndexEntry,
    IndexRequest,
    ModelMetadata,
    index_entry,
    model_config,
    model_metadata,
    model_statistics,
)
from app.api.inference_v2_requests import datatype_of, read_infer
from app.api.json_answers import least_shapes, written
from app.api.large_bodies import check_size
from app.api.plain_response import PlainResponse
from app.api.predict import run_prediction, schema_of, target_for
from app.api.predict_bodies import read_bytes
from app.api.request_ids import exception_handlers, new_request_id
from app.api.threads import convert
from app.core.errors import Forbidden, NotImplementedHere, Unavailable
from app.deployments.fleet import EndpointView, Fleet, Target
from app.metering.records import Usage
from app.organizations.principal import Principal
from runtime.protocol import Predicted

AnyRequest = Request[Any, Any, Any]
VERSION = "1"
EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository(index)",
    "statistics",
]
HEADER_LENGTH = "inference-header-content-length"
_index_decoder = msgspec.json.Decoder(IndexRequest)


@get("/health/live", sync_to_thread=False, summary="Is the server live")
def show_live() -> dict[str, bool]:
    """Whether the process runs; asks nothing else, and needs no key."""
    return {"live": True}


@get("/health/ready", summary="Is the server ready")
async def show_ready(request: AnyRequest) -> dict[str, bool]:
    """503 with the reason when no request can be served. Needs no key."""
    if problem := await problem_of(request.app.state):
        raise Unavailable(problem, retry_after_seconds=5)
    return {"ready": True}


@get("/", sync_to_thread=False, summary="Server metadata")
def show_server() -> dict[str, Any]:
    """The server's name and the extensions of the protocol that it speaks. Needs no key."""
    return {"name": "tapeout", "version": VERSION, "extensions": EXTENSIONS}


MODEL = "/models/{name:str}"
VERSION_OF_MODEL = f"{MODEL}/versions/{{version:str}}"


@get([MODEL, VERSION_OF_MODEL], summary="Model metadata")
async def show_model(
    request: AnyRequest, name: FromPath[str], version: FromPath[str] = ""
) -> ModelMetadata:
    """Inputs and outputs with their datatypes and shapes; -1 is a dynamic axis."""
    target = _target(request, await _reader(request), name, version)
    return model_metadata(target, schema_of(target, name))


@get([f"{MODEL}/ready", f"{VERSION_OF_MODEL}/ready"], summary="Is the model ready")
async def show_model_ready(
    request: AnyRequest, name: FromPath[str], version: FromPath[str] = ""
) -> dict[str, Any]:
    """200 when a replica answers, 503 while none does."""
    target = _target(request, await _reader(request), name, version)
    return {"name": target.endpoint_name, "ready": True}


@get([f"{MODEL}/config", f"{VERSION_OF_MODEL}/config"], summary="Model configuration")
async def show_model_config(
    request: AnyRequest, name: FromPath[str], version: FromPath[str] = ""
) -> dict[str, Any]:
    """In the form of Triton's model configuration."""
    target = _target(request, await _reader(request), name, version)
    return model_config(target, schema_of(target, name))


@get([f"{MODEL}/stats", f"{VERSION_OF_MODEL}/stats"], summary="Model statistics")
async def show_model_stats(
    request: AnyRequest, name: FromPath[str], version: FromPath[str] = ""
) -> dict[str, Any]:
    """Counters since the replicas started. Only the model's owner sees them: they tell what
    others do."""
    principal = await _reader(request)
    target = _target(request, principal, name, version)
    fleet: Fleet = request.app.state.fleet
    for view in _own_endpoints(fleet, principal):
        if view.name == target.endpoint_name:
            return {"model_stats": [_statistics(fleet, view)]}
    raise Forbidden("Only the owner of a model may see its statistics.", code="not_yours")


@get("/models/stats", summary="Statistics of all models")
async def show_stats(request: AnyRequest) -> dict[str, Any]:
    """Of the models of the caller's organization."""
    principal = await _reader(request)
    fleet: Fleet = request.app.state.fleet
    views = _own_endpoints(fleet, principal)
    return {"model_stats": [_statistics(fleet, view) for view in views]}


@post("/repository/index", status_code=200, summary="List models")
async def list_repository(request: AnyRequest) -> list[IndexEntry]:
    """The endpoints that this key may call; `{"ready": true}` leaves out those that do not
    answer."""
    principal, body = await caller_and_body(request, _may_read, receive_small_body)
    check_size(body)
    asked = decode(_index_decoder, body) if body else IndexRequest()
    fleet: Fleet = request.app.state.fleet
    entries = [index_entry(view) for view in fleet.visible_endpoints(principal)]
    return [entry for entry in entries if entry.state == "READY" or not asked.ready]


@post([f"{MODEL}/infer", f"{VERSION_OF_MODEL}/infer"], status_code=200, summary="Infer")
async def infer(
    request: AnyRequest, name: FromPath[str], version: FromPath[str] = ""
) -> ASGIResponse:
    """JSON, or JSON and binary tensors after it, whose length the header
    `Inference-Header-Content-Length` then tells. gzip and deflate are read and, where
    `Accept-Encoding` asks, written. Models that take texts take one `BYTES` input of shape [rows]
    or [rows, 2] instead of their tensors. Metered as any prediction."""
    request_id = new_request_id(request)
    wanted = _wanted(name, version)
    with holding_body(request):
        principal, target, body = await target_for(request, wanted, read_bytes)
        schema = schema_of(target, name)
        for spec in schema.outputs:
            datatype_of(spec)  # before anything is run
        header_length = request.headers.get(HEADER_LENGTH)
        asked = await convert(
            len(body), lambda: read_infer(body, header_length, target.manifest, schema)
        )
    check_answer_values(asked.outputs, least_shapes(schema, asked.given), schema)
    encoding = accepted_encoding(request.headers.get("accept-encoding", ""))
    headers = {"x-request-id": request_id}

    def write(predicted: Predicted) -> bytes:
        content, json_length = infer_answer(
            asked, predicted, target.manifest, target.endpoint_name, target.version_number
        )
        if json_length is not None:
            headers[HEADER_LENGTH] = str(json_length)
        if not encoding or len(content) < MIN_PACKED_BYTES:
            return content
        headers["content-encoding"] = encoding
        return packed(content, encoding)

    async def answer(predicted: Predicted, usage: Usage) -> bytes:
        num_bytes = sum(len(tensor.data) for tensor in predicted.outputs)
        return await written(num_bytes * 4, lambda: write(predicted))

    content = await run_prediction(
        request,
        principal,
        target,
        asked.given,
        answer,
        name=wanted,
        route="/v2/models/infer",
        request_id=request_id,
    )
    media_type = "application/octet-stream" if HEADER_LENGTH in headers else "application/json"
    return PlainResponse(content, media_type, headers)


MEMORY = ["/systemsharedmemory/{rest:path}", "/cudasharedmemory/{rest:path}"]
SETTINGS = ["/trace/setting", f"{MODEL}/trace/setting", "/logging"]
LOADING = [f"/repository{MODEL}/load", f"/repository{MODEL}/unload"]
REFUSED: dict[str, Any] = {"http_method": ["GET", "POST"], "include_in_schema": False}


@route(MEMORY, **REFUSED, sync_to_thread=False)
def refuse_memory() -> None:
    """Client and server need not share a machine here."""
    raise NotImplementedHere("There is no shared memory here; send tensors as binary data.")


@route(SETTINGS, **REFUSED, sync_to_thread=False)
def refuse_settings() -> None:
    """Traces and logs show what others do."""
    raise NotImplementedHere("Settings of traces and logs are the operator's, not a client's.")


@route(LOADING, **REFUSED, sync_to_thread=False)
def refuse_loading() -> None:
    """There is no repository of files to load from."""
    raise NotImplementedHere(
        "Models are deployed by uploading them (see /docs), not loaded from a repository."
    )


# --- shared -----------------------------------------------------------------------------


async def _reader(request: AnyRequest) -> Principal:
    """Whoever may call models or read about them."""
    principal = await bearer_principal(request)
    _may_read(principal)
    return principal


def _may_read(principal: Principal) -> None:
    """Raises `Forbidden`."""
    if not principal.scopes & {"inference", "read"}:
        raise Forbidden("This API key may not read about models.", code="missing_scope")


def _target(request: AnyRequest, principal: Principal, name: str, version: str) -> Target:
    """Raises `NotFound`, `InvalidRequest` or `Unavailable`."""
    return cast(Fleet, request.app.state.fleet).resolve(principal, _wanted(name, version))


def _wanted(name: str, version: str) -> str:
    """As `Fleet.resolve` wants it."""
    return f"{name}@{version}" if version else name


def _own_endpoints(fleet: Fleet, principal: Principal) -> list[EndpointView]:
    return [
        view
        for view in fleet.visible_endpoints(principal)
        if view.desired.organization_id == principal.organization_id
    ]


def _statistics(fleet: Fleet, view: EndpointView) -> dict[str, Any]:
    return model_statistics(view, fleet.live(view.desired.deployment_id))


router = Router(
    "/v2",
    route_handlers=[
        show_live,
        show_ready,
        show_server,
        show_stats,
        show_model,
        show_model_ready,
        show_model_config,
        show_model_stats,
        list_repository,
        infer,
        refuse_memory,
        refuse_settings,
        refuse_loading,
    ],
    exception_handlers=exception_handlers,
    tags=["Open Inference Protocol"],
)
