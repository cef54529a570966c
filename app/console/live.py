"""Live pages by server-sent events: when something may have changed, the database is read again
and every part of the page whose HTML differs is sent.

An event is a rendered part, so nothing depends on having seen the one before; a browser that
lost its connection simply connects again.
"""

import asyncio
import time
import zlib
from collections.abc import AsyncGenerator

from litestar import get
from litestar.params import FromPath, FromQuery
from litestar.response import ServerSentEvent, ServerSentEventMessage
from markupsafe import Markup, escape

from app.console.model_view import ModelView, read_model
from app.console.sessions import signed_in
from app.console.snippets import snippets
from app.console.templating import PageRequest, base_url, render
from app.core.broadcast import Broadcast
from app.core.database import Database
from app.core.errors import NotFound, Unauthenticated
from app.core.storage import Storage
from app.deployments.logs import build_log_name, read_log, replica_log_name
from app.organizations.signins import SignedIn, SignIns

LOG_TAIL_BYTES = 24 * 1024
LOOK_SECONDS = 1.0  # at least this often, while something is under way
SETTLE_SECONDS = 0.25  # at most one look per this long
MAX_STEADY_SECONDS = 120  # then the stream ends: browsers allow few connections at once
MAX_SECONDS = 600
TEMPLATES = (
    "status",
    "build",
    "program",
    "optimisation",
    "candidates",
    "proof",
    "endpoint",
    "versions",
)


async def model_parts(
    view: ModelView, storage: Storage, csrf_token: str, box_url: str
) -> dict[str, Markup]:
    """The parts of a model's page that change by themselves, as HTML by name."""
    context = {"view": view, "token": csrf_token}
    parts = {name: _part(f"models/_{name}.html", **context) for name in TEMPLATES}
    calls = []
    if view.manifest is not None and view.endpoint is not None:
        calls = snippets(box_url, view.endpoint.name, view.manifest)
    is_tried_here = bool(calls) and view.manifest is not None and view.manifest.kind != "embedder"
    playground = f"/console/models/{view.name}/playground" if is_tried_here else ""
    parts["use"] = _part("models/_use.html", snippets=calls, playground=playground)
    parts["log"] = await _log_tail(storage, build_log_name(view.shown.id))
    parts["replica-log"] = escape("Nothing runs yet.")
    if view.endpoint is not None and view.endpoint.replicas:
        newest = view.endpoint.replicas[0]
        parts["replica-log"] = await _log_tail(storage, replica_log_name(newest.id))
    return parts


def _part(template: str, **context: object) -> Markup:
    return Markup(render(template, **context).strip())  # noqa: S704 - our own template, escaped


async def _log_tail(storage: Storage, name: str) -> Markup:
    log = await asyncio.to_thread(read_log, storage.log(name), -LOG_TAIL_BYTES)
    text = log.text
    if log.next_offset > LOG_TAIL_BYTES and "\n" in text:
        text = text.split("\n", 1)[1]  # the first line is cut
    return escape(text.rstrip("\n") or "Nothing was printed yet.")


def seen_mark(parts: dict[str, Markup]) -> str:
    """What a page already shows, short enough for a URL."""
    return ".".join(f"{zlib.crc32(part.encode()):x}" for _, part in sorted(parts.items()))


@get("/models/{name:str}/versions/{number:int}/events")
async def model_events(
    request: PageRequest, name: FromPath[str], number: FromPath[int], seen: FromQuery[str] = ""
) -> ServerSentEvent:
    """The stream behind a model's page; `seen` is the mark of what it shows."""
    person = signed_in(request)
    person.principal.require("read")
    database: Database = request.app.state.database
    async with database.read() as session:
        view = await read_model(session, person.principal.organization_id, name, number)
    stream = _model_stream(request, person, view, seen)
    return ServerSentEvent(stream, headers={"Cache-Control": "no-store"})


async def _model_stream(
    request: PageRequest, person: SignedIn, first: ModelView, seen: str
) -> AsyncGenerator[ServerSentEventMessage]:
    storage: Storage = request.app.state.storage
    marks = seen.split(".")
    started = steady_since = time.monotonic()
    async for view in _views(request, person, first):
        if view is None:
            break  # deleted
        parts = await model_parts(view, storage, person.csrf_token, base_url(request))
        new_marks = seen_mark(parts).split(".")
        for part_name, html in _changed(parts, marks, new_marks):
            yield ServerSentEventMessage(data=html, event=part_name)
        now = time.monotonic()
        if marks != new_marks or not view.is_steady:
            steady_since = now
        else:
            # A comment finds out whether the browser is still there.
            yield ServerSentEventMessage(data=None, comment="")
        marks = new_marks
        if now - steady_since > MAX_STEADY_SECONDS or now - started > MAX_SECONDS:
            break
    else:
        return  # the box is shutting down: without a last word the browser comes back
    yield ServerSentEventMessage(data="", event="done")


def _changed(
    parts: dict[str, Markup], marks: list[str], new_marks: list[str]
) -> list[tuple[str, Markup]]:
    """The parts whose mark is new; all of them if the old marks are not of this page."""
    if len(marks) != len(new_marks):
        marks = [""] * len(new_marks)
    return [
        part
        for part, old, new in zip(sorted(parts.items()), marks, new_marks, strict=True)
        if old != new
    ]


async def _views(
    request: PageRequest, person: SignedIn, first: ModelView
) -> AsyncGenerator[ModelView | None]:
    """The page as it is now, again and again; None once the model or the session is gone."""
    database: Database = request.app.state.database
    broadcast: Broadcast = request.app.state.broadcast
    sign_ins: SignIns = request.app.state.sign_ins
    organization_id = person.principal.organization_id
    async for _ in broadcast.listen(f"version:{first.shown.id}", LOOK_SECONDS):
        try:
            now = (await sign_ins.authenticate(person.token)).principal
            if now.organization_id != organization_id:
                raise Unauthenticated("The session is another organization's now.")
            async with database.read() as session:
                view = await read_model(session, organization_id, first.name, first.shown.number)
        except (NotFound, Unauthenticated):
            yield None
            return
        yield view
        await asyncio.sleep(SETTLE_SECONDS)
