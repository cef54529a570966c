"""Notices in the console: the banner on every page, dismissing one, and who else is told."""

from collections.abc import Sequence
from typing import Any

from litestar import Response, Router, post
from litestar.params import FromPath

from app.billing.payments import notices
from app.billing.payments.tables import Notice
from app.console.sessions import SAFE_METHODS, form_field, go, require_person, safe_next, signed_in
from app.console.templating import PageRequest
from app.core.database import Database


async def enter(request: PageRequest) -> None:
    """Lets only people with a session pass, and reads what a whole page tells them first."""
    await require_person(request)
    if request.method in SAFE_METHODS and not request.headers.get("hx-request"):
        request.state["notices"] = await _shown(request)


async def _shown(request: PageRequest) -> Sequence[Notice]:
    database: Database = request.app.state.database
    async with database.read() as session:
        organization_id = signed_in(request).principal.organization_id
        return await notices.shown_notices(session, organization_id)


@post("/notices/{notice_id:str}/dismiss", status_code=200)
async def dismiss_notice(request: PageRequest, notice_id: FromPath[str]) -> Response[Any]:
    """Takes it off the pages of everybody in the organization."""
    principal = signed_in(request).principal
    principal.require("admin")
    target = safe_next(await form_field(request, "next"))
    database: Database = request.app.state.database
    async with database.write() as session:
        await notices.dismiss(session, principal.organization_id, notice_id)
    return go(request, target)


router = Router("", route_handlers=[dismiss_notice])
