"""`POST /v1/embeddings`: texts or token ids in, vectors out, in OpenAI's shapes."""

import base64
from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast

import msgspec
import numpy as np
from litestar import Request, post
from litestar.response.base import ASGIResponse
from msgspec import Meta

from app.api.auth import caller_and_body, may_infer
from app.api.bodies import holding_body, receive_body
from app.api.call import Call
from app.api.json_answers import written
from app.api.large_bodies import decode_and
from app.api.relay import Relay
from app.api.request_ids import new_request_id
from app.api.streaming import CancelledOnDisconnect
from app.core.errors import InvalidRequest
from app.metering.records import Usage
from runtime.protocol import Embed, Embedded, EmbedderInfo

MAX_TEXTS = 2048  # OpenAI's
ROUTE = "/v1/embeddings"

AnyRequest = Request[Any, Any, Any]


class EmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One text, several, the token ids of one, or those of several."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    user: str | None = None


class TextEmbedding(msgspec.Struct, frozen=True):
    """`embedding` is a list of numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingsUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, frozen=True):
    data: list[TextEmbedding]
    model: str
    usage: EmbeddingsUsage
    object: str = "list"


_decoder = msgspec.json.Decoder(EmbeddingsRequest)
_encoder = msgspec.json.Encoder()


@post("/embeddings", status_code=200, summary="Create embeddings")
async def create_embeddings(request: AnyRequest) -> ASGIResponse:
    """OpenAI's embeddings. Texts longer than the model takes are refused, never cut; `dimensions`
    is for models that declare that their vectors may be."""
    request_id = new_request_id(request)
    with holding_body(request):
        principal, received = await caller_and_body(request, may_infer, receive_body)
        body, (texts, token_ids) = await decode_and(_decoder, received, inputs_of)
    target = request.app.state.fleet.resolve(principal, body.model)
    info = target.manifest.embedder
    if info is None:
        raise InvalidRequest(
            f"{body.model!r} makes no embeddings; it is a {target.manifest.kind}.",
            param="model",
            code="wrong_kind_of_model",
        )
    dimensions = _dimensions(body, info)
    embed = Embed(
        request_id=request_id,
        texts=texts,
        token_ids=token_ids,
        fairness_key=principal.organization_id,
    )
    relay: Relay = request.app.state.relay
    call = Call(principal=principal, target=target, route=ROUTE, request_id=request_id)

    async def answer(embedded: Embedded, usage: Usage) -> bytes:
        num_tokens = usage.input_tokens + usage.cached_tokens
        return await written(
            len(embedded.data), lambda: _answer(body, embedded, dimensions, num_tokens)
        )

    embedding = relay.embed(call, embed, answer)
    with CancelledOnDisconnect(request.receive, embedding):
        content = await embedding
    return ASGIResponse(body=content, headers={"x-request-id": request_id})


def inputs_of(body: EmbeddingsRequest) -> tuple[list[str] | None, list[list[int]] | None]:
    """The texts, or the token ids of each. Raises `InvalidRequest` naming what is wrong."""
    given = body.input
    if isinstance(given, str):
        given = [given]
    if not given:
        raise InvalidRequest("input must not be empty.", param="input")
    if all(isinstance(item, int) for item in given):
        given = [cast(list[int], given)]
    if len(given) > MAX_TEXTS:
        raise InvalidRequest(
            f"input holds {len(given)} texts; {MAX_TEXTS} are the most in one request.",
            param="input",
            code="too_many_inputs",
        )
    for index, item in enumerate(given):
        if item == "" or item == []:
            raise InvalidRequest(f"input[{index}] is empty.", param="input", code="empty_input")
    if all(isinstance(item, str) for item in given):
        return cast(list[str], given), None
    if not all(isinstance(item, list) for item in given):
        raise InvalidRequest(
            "input must be a text, a list of texts, or the token ids of one or several.",
            param="input",
        )
    token_ids = cast(list[list[int]], given)
    for index, ids in enumerate(token_ids):
        if not all(0 <= token_id < 2**31 for token_id in ids):
            raise InvalidRequest(f"input[{index}]: token ids are 0 or more.", param="input")
    return None, token_ids


def _dimensions(body: EmbeddingsRequest, info: EmbedderInfo) -> int:
    """How many leading numbers of a vector are wanted."""
    wanted = body.dimensions
    if wanted is None or wanted == info.dimensions:
        return info.dimensions
    allowed = info.matryoshka_dimensions
    if allowed is None or wanted > info.dimensions or (allowed and wanted not in allowed):
        reason = f"this model's vectors have {info.dimensions} numbers"
        if allowed is None:
            reason += " and are not declared to keep their meaning when cut (matryoshka)"
        elif allowed:
            reason += f", and may be cut to {', '.join(map(str, allowed))}"
        raise InvalidRequest(
            f"dimensions: {reason}.", param="dimensions", code="unsupported_dimensions"
        )
    return wanted


def _answer(body: EmbeddingsRequest, embedded: Embedded, dimensions: int, num_tokens: int) -> bytes:
    """Cut vectors get length 1 again, as OpenAI's do."""
    vectors = np.frombuffer(embedded.data, dtype="<f4").reshape(-1, embedded.dimensions)
    if dimensions < embedded.dimensions:
        vectors = vectors[:, :dimensions]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.where(lengths > 0, lengths, 1)
    data = [
        TextEmbedding(index, embedding)
        for index, embedding in enumerate(_encoded(vectors.astype("<f4"), body.encoding_format))
    ]
    usage = EmbeddingsUsage(num_tokens, num_tokens)
    return _encoder.encode(Embeddings(data, body.model, usage))


def _encoded(vectors: Any, encoding_format: str | None) -> Iterator[list[float] | str]:
    for vector in vectors:
        if encoding_format == "base64":
            yield base64.b64encode(vector.tobytes()).decode()
        else:
            yield vector.tolist()
