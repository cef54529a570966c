"""The playground: of a tensor program its form, a run of it, and what came out. Of decoders it is
`decoder_playground.py`.

A run is a request like any other: held, metered and billed to the person's organization.
"""

from typing import Any

import msgspec
from litestar import Response, Router, get, post
from litestar.params import FromPath

from app.api.bodies import TAKES_FILE, receive_form
from app.api.labels import labels_of
from app.api.predict import run_prediction, schema_of
from app.api.tensors import array_of
from app.console.decoder_playground import run_decoder, show_decoder
from app.console.meter import Reading, settled_reading
from app.console.playground_form import Field, fields_of, read_form
from app.console.sessions import signed_in
from app.console.templating import PageRequest, page, render
from app.core.errors import AppError
from app.core.ids import new_id
from app.deployments.fleet import Fleet
from app.metering.records import Usage
from runtime.protocol import Manifest, Predicted, Tensor

MAX_FORM_BYTES = 16 * 1024**2
MAX_SHOWN_CHARS = 4_000
MAX_SHOWN_NUMBERS = 2_000
MAX_BARS = 10

Number = int | float


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """One output. `bars` are the greatest values of its first row, where that is a short list:
    (name, value as text, thousandths of the greatest)."""

    name: str
    about: str
    text: str
    bars: list[tuple[str, str, int]]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a run gave, and how it ran."""

    outputs: list[Shown]
    batch_rows: int
    queue_ms: float


@get("/models/{name:str}/playground")
async def show_playground(request: PageRequest, name: FromPath[str]) -> Response[str]:
    """The form, with an example in it."""
    principal = signed_in(request).principal
    principal.require("inference")
    fleet: Fleet = request.app.state.fleet
    target = fleet.resolve(principal, name)
    if target.manifest.decoder is not None:
        return show_decoder(request, target, name)
    schema_of(target, name)
    return _page(request, name, fields_of(target.manifest))


@post(
    "/models/{name:str}/playground",
    status_code=200,
    request_max_body_size=MAX_FORM_BYTES,
    opt=TAKES_FILE,
)
async def run_playground(request: PageRequest, name: FromPath[str]) -> Response[str]:
    """Runs what the form holds, and shows the answer below it; to htmx, the answer alone."""
    principal = signed_in(request).principal
    principal.require("inference")
    fleet: Fleet = request.app.state.fleet
    target = fleet.resolve(principal, name)
    if target.manifest.decoder is not None:
        return await run_decoder(request, name)
    schema_of(target, name)
    form = await receive_form(request)  # which is here already: see `require_person`
    request_id = new_id("req")
    try:
        given = await read_form(form, target.manifest)

        async def answer(predicted: Predicted, usage: Usage) -> Result:
            return _result(predicted, target.manifest)

        result = await run_prediction(
            request,
            principal,
            target,
            given,
            answer,
            name=name,
            route="/console/playground",
            request_id=request_id,
        )
    except AppError as error:
        if error.status >= 500 or request.headers.get("hx-request"):
            raise
        sent = {key: value for key, value in form.multi_items() if isinstance(value, str)}
        fields = fields_of(target.manifest, sent)
        return _page(request, name, fields, error=error.message, status_code=error.status)
    reading = await settled_reading(request, principal.organization_id, request_id)
    if request.headers.get("hx-request"):
        html = render("playground/_result.html", result=result, reading=reading)
        return Response(html, media_type="text/html; charset=utf-8")
    sent = {key: value for key, value in form.multi_items() if isinstance(value, str)}
    return _page(request, name, fields_of(target.manifest, sent), result=result, reading=reading)


def _page(
    request: PageRequest,
    name: str,
    fields: list[Field],
    *,
    result: Result | None = None,
    reading: Reading | None = None,
    error: str = "",
    status_code: int = 200,
) -> Response[str]:
    return page(
        request,
        "playground/playground.html",
        status_code=status_code,
        name=name,
        fields=fields,
        result=result,
        reading=reading,
        error=error,
    )


def _result(predicted: Predicted, manifest: Manifest) -> Result:
    labels = labels_of(predicted, manifest)
    outputs = [shown(tensor) for tensor in predicted.outputs]
    if labels:
        bars = [(best.label, f"{best.score:.1%}", int(best.score * 1000)) for best in labels[0]]
        outputs[0] = msgspec.structs.replace(outputs[0], bars=bars)
    return Result(
        outputs=outputs,
        batch_rows=predicted.batch_rows,
        queue_ms=predicted.queue_ns / 1e6,
    )


def shown(tensor: Tensor) -> Shown:
    """An output as text, cut where there is much of it; and as bars, where it is a short row."""
    array = array_of(tensor)
    size = " \N{MULTIPLICATION SIGN} ".join(map(str, tensor.shape)) or "one number"
    if array.size > MAX_SHOWN_NUMBERS:
        text = f"{array.size:,} numbers; the first {MAX_SHOWN_NUMBERS:,} flattened:\n"
        text += str(array.ravel()[:MAX_SHOWN_NUMBERS].tolist())
    else:
        text = str(array.tolist())
    row: list[Number] = array[0].tolist() if array.ndim == 2 and len(array) else []
    # Of truths and complex numbers none is the greatest.
    is_short = 2 <= len(row) <= 4 * MAX_BARS and array.dtype.kind in "iuf"
    return Shown(
        name=tensor.name,
        about=f"{tensor.dtype}, {size}",
        text=text[:MAX_SHOWN_CHARS] + ("…" if len(text) > MAX_SHOWN_CHARS else ""),
        bars=_bars(row) if is_short else [],
    )


def _bars(row: list[Any]) -> list[tuple[str, str, int]]:
    """The greatest values of a row; NaN is none."""
    known = [(value, index) for index, value in enumerate(row) if abs(value) < float("inf")]
    known.sort(key=lambda pair: (-pair[0], pair[1]))
    if not known:
        return []
    most, least = known[0][0], min(0, known[-1][0])
    span = (most / 2 - least / 2) or 1  # of halves, which do not overflow
    return [
        (str(index), f"{value:.4g}", max(0, int(1000 * ((value / 2 - least / 2) / span))))
        for value, index in known[:MAX_BARS]
    ]


router = Router("", route_handlers=[show_playground, run_playground])
