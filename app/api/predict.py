"""`POST /models/{name}/predict`, and the run of a prediction that every dialect shares.

What bodies hold is `predict_bodies.py`'s, what answers look like `predict_answers.py`'s.
"""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from litestar import Request, Router, post
from litestar.params import FromPath
from litestar.response.base import ASGIResponse

from app.api.auth import caller_and_body
from app.api.bodies import holding_body
from app.api.call import Call
from app.api.forms import FormRequest
from app.api.json_answers import check_json_shapes, least_shapes, written
from app.api.plain_response import PlainResponse
from app.api.predict_answers import JSON, PredictAnswer, answer_bytes, answer_size, chosen_form
from app.api.predict_bodies import Given, PredictRequest, read_body, receive
from app.api.prediction import Answer
from app.api.relay import Relay
from app.api.request_ids import exception_handlers, new_request_id
from app.api.streaming import CancelledOnDisconnect
from app.core.errors import InvalidRequest
from app.deployments.fleet import Fleet, Target
from app.metering.records import Usage
from app.organizations.principal import Principal
from runtime.protocol import Predict, Predicted, Schema

AnyRequest = Request[Any, Any, Any]
T = TypeVar("T")

__all__ = [
    "PredictAnswer",
    "PredictRequest",
    "router",
    "run_prediction",
    "schema_of",
    "target_for",
]


@post("/{name:str}/predict", status_code=200, summary="Run a tensor model")
async def predict(request: AnyRequest, name: FromPath[str]) -> ASGIResponse:
    """Body `{"inputs": {name: nested list}}`; with one input the list alone will do. Models that
    take texts also take `{"texts": [...]}`; models of images a PNG, JPEG or WebP as the body.
    Arrays may come as `application/x-npy`, `application/x-npz`, `application/octet-stream` or the
    parts of a form, and are answered so where `Accept` says it."""
    request_id = new_request_id(request)
    with holding_body(request):
        principal, target, received = await target_for(request, name, receive)
        schema = schema_of(target, name)
        form = chosen_form(request.headers.get("accept", ""), schema)
        given = await read_body(received, target.manifest, schema)
    if form == JSON:
        check_json_shapes(least_shapes(schema, given))

    async def answer(predicted: Predicted, usage: Usage) -> bytes:
        return await written(
            answer_size(form, predicted),
            lambda: answer_bytes(form, predicted, usage, target.manifest),
        )

    body = await run_prediction(
        request,
        principal,
        target,
        given,
        answer,
        name=name,
        route="/models/predict",
        request_id=request_id,
    )
    return PlainResponse(body, form, {"x-request-id": request_id})


async def target_for(
    request: AnyRequest,
    name: str,
    receive: Callable[[AnyRequest], Awaitable[T]],
) -> tuple[Principal, Target, T]:
    """Who asks, the replica that is to answer, and the body. A replica may be replaced while a slow
    body comes in, so it is chosen when that is here; what can be refused before is."""
    fleet: Fleet = request.app.state.fleet

    def check(principal: Principal) -> None:
        principal.require("inference")
        schema_of(fleet.resolve(principal, name), name)

    principal, received = await caller_and_body(request, check, receive)
    return principal, fleet.resolve(principal, name), received


def schema_of(target: Target, name: str) -> Schema:
    """Raises `InvalidRequest` for a model that is no tensor program, naming the route for it."""
    manifest = target.manifest
    if manifest.schema is None or manifest.kind != "tensor":
        raise InvalidRequest(
            f"{name!r} makes embeddings; call POST /v1/embeddings."
            if manifest.kind == "embedder"
            else f"{name!r} generates text; call POST /v1/completions or /v1/chat/completions.",
            param="model",
            code="wrong_kind_of_model",
        )
    return manifest.schema


async def run_prediction(
    request: AnyRequest,
    principal: Principal,
    target: Target,
    given: Given,
    answer: Answer[T],
    *,
    name: str,
    route: str,
    request_id: str,
) -> T:
    """Holds, runs, makes the answer, meters and settles, on another replica of `name` where the
    target is replaced before it gets the request. A client that leaves drops what has not begun."""
    fleet: Fleet = request.app.state.fleet
    relay: Relay = request.app.state.relay
    sent = Predict(
        request_id=request_id,
        inputs=given.inputs,
        texts=given.texts,
        image=given.image,
        fairness_key=principal.organization_id,
    )
    call = Call(
        principal=principal,
        target=target,
        route=route,
        request_id=request_id,
        resolve=lambda: fleet.resolve(principal, name),
    )
    prediction = relay.predict(call, sent, answer)
    with CancelledOnDisconnect(request.receive, prediction):
        return await prediction


router = Router(
    "/models",
    route_handlers=[predict],
    request_class=FormRequest,
    exception_handlers=exception_handlers,
    tags=["Predictions"],
)
