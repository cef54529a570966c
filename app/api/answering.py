"""One request for generated text, in any API's dialect, from its body to its answer.

Owns the order of it: who asks, what for, which model, then the relay. What is held and settled is
`relay.py`'s.
"""

from typing import TYPE_CHECKING, Any

import msgspec
from litestar import Request
from litestar.response.base import ASGIResponse

from app.api.auth import caller_and_body, may_infer
from app.api.bodies import holding_body, receive_body
from app.api.call import Call
from app.api.dialect import Dialect, usage_of
from app.api.large_bodies import decode_and
from app.api.relay import Relay
from app.api.request_ids import id_headers, new_request_id
from app.api.streaming import CancelledOnDisconnect, EventStream, StreamedAnswer
from app.core.errors import AppError, InvalidRequest
from app.core.security import derive_key
from app.metering.records import Tally
from runtime.protocol import DecoderInfo, Generate, SequenceOutput

if TYPE_CHECKING:
    from app.deployments.replica import Target

AnyRequest = Request[Any, Any, Any]
_encoder = msgspec.json.Encoder()


async def respond(request: AnyRequest, dialect_class: type[Dialect[Any]]) -> ASGIResponse:
    """Authenticates, decodes, runs and answers. A stream begins with its first event, so that
    whatever goes wrong before still has an HTTP status."""
    dialect, target, generate = await read(request, dialect_class)
    relay: Relay = request.app.state.relay
    call = Call(
        principal=dialect.principal,
        target=target,
        route=dialect.route,
        service_class=dialect.service_class,
        is_stream=dialect.is_stream,
        request_id=dialect.request_id,
    )
    answer = StreamedAnswer(dialect) if dialect.is_stream else WholeAnswer(dialect)
    execution = relay.generate(call, generate, answer)
    try:
        with CancelledOnDisconnect(request.receive, execution):
            await execution.started
            body = await execution.next_body()
    except AppError as error:
        raise dialect.renamed(error) from None
    if dialect.is_stream:
        return EventStream(execution, dialect, body)
    return ASGIResponse(body=body, headers=id_headers(dialect.request_id))


class WholeAnswer:
    """All of a dialect's answer at its end."""

    def __init__(self, dialect: Dialect[Any]) -> None:
        self._dialect = dialect
        self._outputs: list[SequenceOutput] = []

    def add(self, outputs: list[SequenceOutput], tally: Tally) -> bytes:
        self._outputs += outputs
        return b""

    def finish(self, tally: Tally) -> bytes:
        return _encoder.encode(self._dialect.answer(self._outputs, usage_of(tally)))


async def read(
    request: AnyRequest, dialect_class: type[Dialect[Any]]
) -> "tuple[Dialect[Any], Target, Generate]":
    """The request of somebody who may make it, the replica for it, and its form for the worker."""
    request_id = new_request_id(request)
    with holding_body(request):
        principal, received = await caller_and_body(request, may_infer, receive_body)
        body, dialect = await decode_and(
            dialect_class.decoder, received, lambda body: dialect_class(body, principal, request_id)
        )
    target = request.app.state.fleet.resolve(principal, body.model)
    decoder = decoder_of(target, body.model)
    # A worker runs somebody's model: it learns a key of this version, not the tenant's own.
    cache_salt = derive_key(principal.cache_salt, "prefix cache", target.version_id)
    return dialect, target, dialect.generate(decoder, cache_salt)


def decoder_of(target: "Target", model_name: str) -> DecoderInfo:
    """Raises `InvalidRequest` for a model that does not generate text."""
    decoder = target.manifest.decoder
    if decoder is None:
        is_embedder = target.manifest.kind == "embedder"
        route = "/v1/embeddings" if is_embedder else f"/models/{model_name}/predict"
        raise InvalidRequest(
            f"{model_name!r} does not generate text; call POST {route}.",
            param="model",
            code="wrong_kind_of_model",
        )
    return decoder


def json_answer(answer: msgspec.Struct, request_id: str) -> ASGIResponse:
    return ASGIResponse(body=_encoder.encode(answer), headers=id_headers(request_id))
