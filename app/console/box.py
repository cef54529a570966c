"""The operator's page Box: its devices and what runs on them, and the recommended model."""

from typing import Any

from litestar import Response, Router, get, post

from app.api.writing import writing
from app.billing.standings import read_standings
from app.console.overview_view import read_running
from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, page
from app.core.broadcast import Broadcast
from app.core.database import Database
from app.core.errors import AppError
from app.deployments import default_model
from app.deployments.devices import Devices
from app.deployments.service import CHANGED
from app.settings import Settings

HERE = "/console/box"


@get("/box")
async def show_box(request: PageRequest) -> Response[str]:
    """What the machine holds, of all organizations."""
    return await _page(request)


@post("/box/default-model", status_code=200)
async def choose_default(request: PageRequest) -> Response[Any]:
    """What `default` means from the next request on; no name ends it."""
    principal = signed_in(request).principal
    principal.require_operator()
    sent = {name: await form_field(request, name) for name in ("model", "note")}
    try:
        async with writing(request, principal, "admin", operator=True) as session:
            if sent["model"]:
                await default_model.choose_default(
                    session, principal.organization_id, sent["model"], sent["note"]
                )
            else:
                await default_model.end_default(session)
    except AppError as error:
        return await _page(request, error=error, sent=sent)
    broadcast: Broadcast = request.app.state.broadcast
    broadcast.publish(CHANGED)
    return go(request, f"{HERE}?notice={'default' if sent['model'] else 'default-gone'}")


async def _page(
    request: PageRequest, *, error: AppError | None = None, sent: dict[str, str] | None = None
) -> Response[str]:
    principal = signed_in(request).principal
    principal.require_operator()
    settings: Settings = request.app.state.settings
    devices: Devices = request.app.state.devices
    database: Database = request.app.state.database
    async with database.read() as session:
        running = await read_running(session)
        chosen = await default_model.find_default(session)
        candidates = await default_model.default_candidates(session, principal.organization_id)
        standings = await read_standings(session, settings.currency)
    held = {"model": chosen.name if chosen else "", "note": chosen.note if chosen else ""}
    return page(
        request,
        "box/box.html",
        status_code=error.status if error else 200,
        devices=await devices.read(),
        device=settings.device,
        running=running,
        memory_bytes=sum(line.memory_bytes for line in running),
        chosen=chosen,
        candidates=candidates,
        standings=standings,
        held=held | (sent or {}),
        error=error.message if error else "",
    )


router = Router("", route_handlers=[show_box, choose_default])
