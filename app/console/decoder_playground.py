"""The playground of a decoder: a conversation, or a text to continue, and what it costs.

A run is a request like any other. Without script the whole answer comes with the page; with it
the answer is streamed, with the meter beside it.
"""

from typing import TYPE_CHECKING, Any

import msgspec
from litestar import Response, Router, get, post
from litestar.params import FromPath
from litestar.response.base import ASGIResponse

from app.api.bodies import receive_form
from app.api.call import Call
from app.api.execution import Answer, Execution
from app.api.relay import Relay
from app.api.streaming import CancelledOnDisconnect
from app.billing.prices import PriceTable
from app.console.decoder_form import (
    DecoderForm,
    dialect_of,
    empty_form,
    read_decoder_form,
)
from app.console.meter import Reading, reading, settled_reading
from app.console.sessions import signed_in
from app.console.templating import PageRequest, page
from app.core.errors import AppError, InvalidRequest
from app.core.ids import new_id
from app.core.security import derive_key
from app.deployments.fleet import Fleet, Target
from app.metering.records import Tally
from runtime.protocol import DecoderInfo, SequenceOutput

if TYPE_CHECKING:
    from litestar.types import Receive, Scope, Send

MAX_FORM_BYTES = 4 * 1024**2


def show_decoder(
    request: PageRequest,
    target: Target,
    name: str,
    form: DecoderForm | None = None,
    *,
    reading: Reading | None = None,
    answer: str = "",
    error: str = "",
    status_code: int = 200,
) -> Response[str]:
    """The form; after a run also the answer and what it cost."""
    decoder = decoder_of(target, name)
    form = form or empty_form(decoder)
    return page(
        request,
        "playground/decoder.html",
        status_code=status_code,
        name=name,
        decoder=decoder,
        form=form,
        turns_json=msgspec.json.encode(form.turns).decode(),
        reading=reading,
        answer=answer,
        error=error,
    )


async def run_decoder(request: PageRequest, name: str) -> Response[str]:
    """The whole answer at once, in the page."""
    principal = signed_in(request).principal
    form = read_decoder_form(await receive_form(request))
    fleet: Fleet = request.app.state.fleet
    target = fleet.resolve(principal, name)
    decoder = decoder_of(target, name)
    try:
        execution = _begin(request, target, name, form, WholeText(decoder), is_stream=False)
        with CancelledOnDisconnect(request.receive, execution):
            await execution.started
            answer = (await execution.next_body()).decode()
    except AppError as error:
        if error.status >= 500:
            raise
        return show_decoder(
            request, target, name, form, error=error.message, status_code=error.status
        )
    final = await settled_reading(request, principal.organization_id, execution.request_id)
    if decoder.has_chat_template:
        form = msgspec.structs.replace(form, text="", turns=form.said(answer))
    return show_decoder(request, target, name, form, reading=final, answer=answer)


@post(
    "/models/{name:str}/playground/stream",
    status_code=200,
    request_max_body_size=MAX_FORM_BYTES,
)
async def stream_decoder(request: PageRequest, name: FromPath[str]) -> ASGIResponse:
    """The answer as server-sent events of JSON: `text` that was added, the meter, and at the end
    what the receipt says. Whatever goes wrong before the first of them has a status."""
    principal = signed_in(request).principal
    principal.require("inference")
    form = read_decoder_form(await receive_form(request))
    fleet: Fleet = request.app.state.fleet
    target = fleet.resolve(principal, name)
    answer = MeteredText(decoder_of(target, name), request.app.state.prices)
    execution = _begin(request, target, name, form, answer, is_stream=True)
    with CancelledOnDisconnect(request.receive, execution):
        await execution.started
        first = await execution.next_body()
    return MeteredStream(request, execution, first)


@get("/models/{name:str}/playground/runs/{request_id:str}")
async def show_reading(
    request: PageRequest, name: FromPath[str], request_id: FromPath[str]
) -> Response[Reading]:
    """What a run cost that was stopped: its stream is gone, its receipt comes a moment later."""
    principal = signed_in(request).principal
    principal.require("read")
    return Response(await settled_reading(request, principal.organization_id, request_id))


def decoder_of(target: Target, name: str) -> DecoderInfo:
    """Raises `InvalidRequest` for a model that does not generate text."""
    decoder = target.manifest.decoder
    if decoder is None:
        raise InvalidRequest(f"{name!r} does not generate text.", code="wrong_kind_of_model")
    return decoder


def text_of(outputs: list[SequenceOutput], decoder: DecoderInfo) -> str:
    """What was generated; the ids themselves where there is no tokenizer."""
    if decoder.has_tokenizer:
        return "".join(output.text for output in outputs)
    return "".join(f" {token_id}" for output in outputs for token_id in output.token_ids)


def _begin(
    request: PageRequest,
    target: Target,
    name: str,
    form: DecoderForm,
    answer: Answer,
    *,
    is_stream: bool,
) -> Execution:
    principal = signed_in(request).principal
    decoder = decoder_of(target, name)
    request_id = new_id("req")
    dialect = dialect_of(form, name, decoder, principal, request_id, is_stream=is_stream)
    relay: Relay = request.app.state.relay
    call = Call(
        principal=principal,
        target=target,
        route="/console/playground",
        service_class=dialect.service_class,
        is_stream=is_stream,
        request_id=request_id,
    )
    # The salt of the API's requests: what a program cached is found from here, and back.
    cache_salt = derive_key(principal.cache_salt, "prefix cache", target.version_id)
    return relay.generate(call, dialect.generate(decoder, cache_salt), answer)


class WholeText:
    """The text alone, at its end."""

    def __init__(self, decoder: DecoderInfo) -> None:
        self._decoder = decoder
        self._texts: list[str] = []

    def add(self, outputs: list[SequenceOutput], tally: Tally) -> bytes:
        self._texts.append(text_of(outputs, self._decoder))
        return b""

    def finish(self, tally: Tally) -> bytes:
        return "".join(self._texts).encode()


class MeteredText:
    """Events of what was added and what the request has cost by then."""

    def __init__(self, decoder: DecoderInfo, prices: PriceTable) -> None:
        self._decoder = decoder
        self._prices = prices

    def add(self, outputs: list[SequenceOutput], tally: Tally) -> bytes:
        text = text_of(outputs, self._decoder)
        return _event({"text": text, "meter": reading(tally, self._prices)})

    def finish(self, tally: Tally) -> bytes:
        return b""


class MeteredStream(ASGIResponse):
    """Events of one execution, each a JSON object: `{"text", "meter"}` while it runs, then
    `{"end": meter}` or `{"error": message}`."""

    _should_set_content_length = False

    def __init__(self, request: PageRequest, execution: Execution, first: bytes) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={
                "cache-control": "no-store",
                "x-accel-buffering": "no",
                "x-request-id": execution.request_id,
            },
        )
        self._request = request
        self._execution = execution
        self._first = first

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        execution = self._execution
        with CancelledOnDisconnect(receive, execution):
            await self.start_response(send)
            body = self._first
            try:
                while body:
                    await _send(send, body, more=True)
                    body = await execution.next_body()
                organization_id = execution.tally.admitted.organization_id
                final = await settled_reading(self._request, organization_id, execution.request_id)
                await _send(send, _event({"end": final}), more=False)
            except AppError as error:
                await _send(send, _event({"error": error.message}), more=False)


def _event(event: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(event)


async def _send(send: "Send", body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


router = Router("", route_handlers=[stream_decoder, show_reading])
