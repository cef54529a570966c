"""Notices in the console: the banner on every page, dismissing one, and who else is told."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from litestar import Response, Router, post
from litestar.params import FromPath
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.writing import writing
from app.billing.ledger import lock_account
from app.billing.payments import notices
from app.billing.payments.notice_delivery import check_notify_url
from app.billing.payments.profile import open_profile
from app.billing.payments.tables import Notice
from app.billing.service import MAX_LIMIT_NANO
from app.console.billing import HERE, billing_page
from app.console.sessions import SAFE_METHODS, form_field, go, require_person, safe_next, signed_in
from app.console.templating import PageRequest
from app.core import clock
from app.core.database import Database
from app.core.errors import AppError, Conflict, InvalidRequest, RateLimited
from app.core.money import parse_amount
from app.core.security import new_token
from app.settings import Settings

TEST_PAUSE = timedelta(minutes=1)


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
    async with writing(request, principal, "admin") as session:
        await notices.dismiss(session, principal.organization_id, notice_id)
    return go(request, target)


@post("/billing/notices", status_code=200)
async def change_settings(request: PageRequest) -> Response[Any]:
    """Below which balance to tell, and whom beside these pages. A new address gets a new secret,
    which the answer itself shows, this once."""
    principal = signed_in(request).principal
    principal.require("admin")
    sent = {
        name: (await form_field(request, name)).strip() for name in ("low_balance", "notify_url")
    }
    is_new = bool(await form_field(request, "new_secret"))
    settings: Settings = request.app.state.settings
    secret = ""
    try:
        low_nano = _amount(sent["low_balance"])
        url = check_notify_url(sent["notify_url"], is_operator=principal.is_operator)
        async with writing(request, principal, "admin") as session:
            await lock_account(session, principal.organization_id, settings.currency)
            profile = await open_profile(session, principal.organization_id)
            if url and (is_new or url != profile.notify_url or not profile.notify_secret):
                secret = profile.notify_secret = f"nsec_{new_token()}"
            profile.notify_url, profile.low_balance_nano = url, low_nano
            profile.updated_at = clock.now()
    except AppError as error:
        return await billing_page(request, error=error, sent=sent)
    if secret:
        return await billing_page(request, notify_secret=secret)
    return go(request, f"{HERE}?notice=saved#notices")


@post("/billing/notices/test", status_code=200)
async def send_test(request: PageRequest) -> Response[Any]:
    """A notice that means nothing, to the address alone."""
    principal = signed_in(request).principal
    principal.require("admin")
    settings: Settings = request.app.state.settings
    async with writing(request, principal, "admin") as session:
        await lock_account(session, principal.organization_id, settings.currency)
        profile = await open_profile(session, principal.organization_id)
        if not profile.notify_url:
            raise Conflict("There is no address to send a test to. Save one first.")
        await _refuse_another(session, principal.organization_id)
        await notices.end(session, principal.organization_id, "test")
        message = "This is a test: notices of this organization arrive here."
        notice_id = await notices.notify(
            session, principal.organization_id, "test", message, {"is_test": True}
        )
        assert notice_id is not None, "the one before is over"
        await notices.dismiss(session, principal.organization_id, notice_id)
    request.app.state.clerk.wake("notices")
    return go(request, f"{HERE}?notice=tested#notices")


async def _refuse_another(session: AsyncSession, organization_id: str) -> None:
    newest = await session.scalar(
        select(func.max(Notice.created_at)).where(
            Notice.organization_id == organization_id, Notice.kind == "test"
        )
    )
    if newest is not None and clock.now() - newest < TEST_PAUSE:
        raise RateLimited(
            "A test was sent a moment ago. Wait a minute before the next.",
            code="too_many_tests",
            retry_after_seconds=TEST_PAUSE // timedelta(seconds=1),
        )


def _amount(text: str) -> int | None:
    """None for the box's own choice."""
    if not text:
        return None
    try:
        nano = parse_amount(text)
    except ValueError as error:
        raise InvalidRequest(f"This is not {error}.", param="low_balance") from None
    if nano > MAX_LIMIT_NANO:
        raise InvalidRequest("This is at most a billion.", param="low_balance")
    return nano


router = Router("", route_handlers=[dismiss_notice, change_settings, send_test])
