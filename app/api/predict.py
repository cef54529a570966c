"""`POST /models/{name}/predict`: nested lists (or one npy array) in, the same out."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from litestar import Request, Router, post
from litestar.params import FromPath
from litestar.response.base import ASGIResponse

from app.api import tensors
from app.api.auth import bearer_principal
from app.api.bodies import decode
from app.api.relay import Call, Relay
from app.api.request_ids import exception_handlers, new_request_id
from app.api.streaming import CancelledOnDisconnect
from app.core.errors import InvalidRequest
from app.metering.records import Usage
from runtime.protocol import Predict, Predicted, Schema, Tensor

AnyRequest = Request[Any, Any, Any]
T = TypeVar("T")
NPY = "application/x-npy"
LARGE_BODY_BYTES = 64 * 1024  # converted in a thread, so that nobody else waits


class PredictRequest(msgspec.Struct, frozen=True):
    """`inputs` is checked against the model's schema, not here."""

    inputs: Any


class PredictUsage(msgspec.Struct, frozen=True):
    """`batch_rows` is how many rows, of all callers, ran together; `device_ms` is this request's
    share of that run, which it pays for."""

    device_ms: int
    batch_rows: int
    queue_ns: int


class PredictAnswer(msgspec.Struct, frozen=True):
    outputs: dict[str, Any]
    usage: PredictUsage


_decoder = msgspec.json.Decoder(PredictRequest)
_encoder = msgspec.json.Encoder()


@post("/{name:str}/predict", status_code=200, summary="Run a tensor model")
async def predict(request: AnyRequest, name: FromPath[str]) -> ASGIResponse:
    """Body `{"inputs": {name: nested list}}`; with one input the list alone will do, or an npy
    file as `application/x-npy`. With `Accept: application/x-npy` and one output the answer is an
    npy file too."""
    request_id = new_request_id(request)
    principal = await bearer_principal(request)
    principal.require("inference")
    target = request.app.state.fleet.resolve(principal, name)
    schema = target.manifest.schema
    if schema is None or target.manifest.kind != "tensor":
        is_embedder = target.manifest.kind == "embedder"
        raise InvalidRequest(
            f"{name!r} makes embeddings; call POST /v1/embeddings."
            if is_embedder
            else f"{name!r} generates text; call POST /v1/completions or /v1/chat/completions.",
            param="model",
            code="wrong_kind_of_model",
        )
    inputs = await _inputs(request, schema)
    relay: Relay = request.app.state.relay
    call = Call(
        principal=principal,
        target=target,
        route="/models/predict",
        request_id=request_id,
    )
    sent = Predict(request_id=request_id, inputs=inputs, fairness_key=principal.organization_id)
    prediction = relay.predict(call, sent)
    with CancelledOnDisconnect(request.receive, prediction):
        predicted, usage = await prediction
    return await _answer(request, predicted, usage)


async def _inputs(request: AnyRequest, schema: Schema) -> list[Tensor]:
    body = await request.body()
    if request.headers.get("content-type", "").partition(";")[0].strip() == NPY:
        return await _convert(len(body), lambda: tensors.tensors_of_npy(body, schema))
    return await _convert(
        len(body), lambda: tensors.tensors_of(decode(_decoder, body).inputs, schema)
    )


async def _answer(request: AnyRequest, predicted: Predicted, usage: Usage) -> ASGIResponse:
    headers = {"x-request-id": usage.admitted.request_id}
    size = sum(len(tensor.data) for tensor in predicted.outputs)
    if NPY in request.headers.get("accept", ""):
        if len(predicted.outputs) != 1:
            raise InvalidRequest("This model has several outputs; an npy file holds one.")
        body = await _convert(size, lambda: tensors.npy_of(predicted.outputs[0]))
        return ASGIResponse(body=body, media_type=NPY, headers=headers)
    body = await _convert(size * 4, lambda: _json(predicted, usage))
    return ASGIResponse(body=body, headers=headers)


def _json(predicted: Predicted, usage: Usage) -> bytes:
    """NaN and infinities, which JSON lacks, become null."""
    outputs = {tensor.name: tensors.array_of(tensor).tolist() for tensor in predicted.outputs}
    used = PredictUsage(usage.device_ms, predicted.batch_rows, predicted.queue_ns)
    return _encoder.encode(PredictAnswer(outputs, used))


async def _convert(size_bytes: int, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if size_bytes > LARGE_BODY_BYTES else work()


router = Router(
    "/models",
    route_handlers=[predict],
    exception_handlers=exception_handlers,
    tags=["Predictions"],
)
