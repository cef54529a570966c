"""Organizations for the operator: how each stands, how much it may owe, and credit given to it."""

from datetime import UTC, datetime, timedelta
from typing import Any

from litestar import Response, Router, get, post
from litestar.params import FromPath

from app.api.credits import FROM_ACCOUNT, MAX_NOTE_CHARS
from app.api.writing import writing
from app.billing.credits import add_lot, is_given, open_lots, require_same_lot
from app.billing.ledger import lock_account
from app.billing.service import MAX_LIMIT_NANO, parse_spending_limit, set_spending_limit
from app.billing.standings import read_standings
from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, page
from app.core import clock
from app.core.database import Database
from app.core.errors import AppError, Conflict, InvalidRequest, NotFound
from app.core.ids import new_id
from app.core.money import parse_amount, write_amount
from app.organizations.members import num_owners
from app.organizations.service import get_organization
from app.settings import Settings

HERE = "/console/organizations"
MODES = {
    "prepaid": "Prepaid: nothing beyond its credit",
    "limited": "Postpaid, up to a limit",
    "unlimited": "Postpaid, without a limit",
}


@get("/organizations")
async def list_organizations(request: PageRequest) -> Response[str]:
    """Everybody, with balance, mode and this month's spend."""
    return await show_list(request)


async def show_list(
    request: PageRequest,
    *,
    error: AppError | None = None,
    name: str = "",
    link: str = "",
    made: str = "",
) -> Response[str]:
    """The list, with what came of the form in it: `link` lets an owner into `made`."""
    signed_in(request).principal.require_operator()
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    async with database.read() as session:
        standings = await read_standings(session, settings.currency)
    return page(
        request,
        "organizations/list.html",
        status_code=error.status if error else 200,
        standings=standings,
        modes=MODES,
        name=name,
        link=link,
        made=made,
        error=error.message if error else "",
    )


@get("/organizations/{organization_id:str}")
async def show_organization(request: PageRequest, organization_id: FromPath[str]) -> Response[str]:
    """One of them, with the forms about its money."""
    return await _page(request, organization_id)


@post("/organizations/{organization_id:str}/limit", status_code=200)
async def change_limit(request: PageRequest, organization_id: FromPath[str]) -> Response[Any]:
    """How it pays, in force from the next request on."""
    principal = signed_in(request).principal
    principal.require_operator()
    sent = {name: (await form_field(request, name)).strip() for name in ("mode", "limit")}
    settings: Settings = request.app.state.settings
    try:
        limit_nano = _limit(sent)
        async with writing(request, principal, "admin", operator=True) as session:
            await get_organization(session, organization_id)
            await lock_account(session, organization_id, settings.currency)
            await set_spending_limit(session, organization_id, limit_nano, settings.currency)
    except NotFound:
        raise
    except AppError as error:
        return await _page(request, organization_id, error=error, sent=sent)
    return go(request, f"{HERE}/{organization_id}?notice=limit")


@post("/organizations/{organization_id:str}/credits", status_code=200)
async def give_credit(request: PageRequest, organization_id: FromPath[str]) -> Response[Any]:
    """Once for each form that was shown: sending it again gives nothing twice."""
    principal = signed_in(request).principal
    principal.require_operator()
    names = ("credit", "kind", "expires_on", "note", "grant_id")
    sent = {name: (await form_field(request, name)).strip() for name in names}
    settings: Settings = request.app.state.settings
    try:
        amount_nano, expires_at = _credit(sent), _expiry(sent["expires_on"])
        _check(sent)
        source = f"grant:{organization_id}:{sent['grant_id']}"
        async with writing(request, principal, "admin", operator=True) as session:
            await get_organization(session, organization_id)
            await lock_account(session, organization_id, settings.currency)
            is_past = expires_at is not None and expires_at <= clock.now()
            if is_past and not await is_given(session, source):
                raise InvalidRequest("That day is past.", param="expires_on")
            await add_lot(
                session,
                organization_id,
                sent["kind"],
                amount_nano,
                source=source,
                currency=settings.currency,
                from_account=FROM_ACCOUNT[sent["kind"]],
                expires_at=expires_at,
                note=sent["note"],
            )
            await require_same_lot(
                session,
                source,
                sent["kind"],
                amount_nano,
                expires_at=expires_at,
                note=sent["note"],
            )
    except Conflict as error:
        # This form's key is spent: the one in the answer has another.
        return await _page(
            request, organization_id, error=error, sent=sent | {"grant_id": new_id("grant")}
        )
    except NotFound:
        raise
    except AppError as error:
        return await _page(request, organization_id, error=error, sent=sent)
    return go(request, f"{HERE}/{organization_id}?notice=credited")


async def _page(
    request: PageRequest,
    organization_id: str,
    *,
    error: AppError | None = None,
    sent: dict[str, str] | None = None,
) -> Response[str]:
    signed_in(request).principal.require_operator()
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    async with database.read() as session:
        found = await read_standings(session, settings.currency, organization_id)
        lots = await open_lots(session, organization_id)
        has_owner = await num_owners(session, organization_id) > 0
    if not found:
        raise NotFound("There is no such organization.")
    (standing,) = found
    limit_nano = standing.credit_limit_nano
    held = {
        "mode": standing.mode,
        "limit": write_amount(limit_nano) if limit_nano else "",
        "credit": "",
        "kind": "promotional",
        "expires_on": "",
        "note": "",
        "grant_id": new_id("grant"),
    }
    return page(
        request,
        "organizations/organization.html",
        status_code=error.status if error else 200,
        standing=standing,
        lots=lots,
        has_owner=has_owner,
        modes=MODES,
        held=held | (sent or {}),
        tomorrow=(clock.now() + timedelta(days=1)).date(),
        error=error.message if error else "",
        param=(error.param or "") if error else "",
    )


def _limit(sent: dict[str, str]) -> int | None:
    if sent["mode"] not in MODES:
        raise InvalidRequest("Choose how it pays.", param="mode")
    if sent["mode"] == "unlimited":
        return None
    if sent["mode"] == "prepaid":
        return 0
    limit_nano = parse_spending_limit(sent["limit"])
    if limit_nano == 0:
        raise InvalidRequest("A limit of nothing is prepaid: choose that.", param="spending_limit")
    return limit_nano


def _credit(sent: dict[str, str]) -> int:
    try:
        nano = parse_amount(sent["credit"])
    except ValueError as error:
        raise InvalidRequest(f"Credit is {error}.", param="credit") from None
    if not 0 < nano <= MAX_LIMIT_NANO:
        raise InvalidRequest("Credit is more than nothing, and at most a billion.", param="credit")
    return nano


def _expiry(text: str) -> datetime | None:
    """The day begins without it."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        raise InvalidRequest(
            "Give the day it ends, such as 2027-01-31, or none.", param="expires_on"
        ) from None


def _check(sent: dict[str, str]) -> None:
    if sent["kind"] not in FROM_ACCOUNT:
        raise InvalidRequest("Choose whether it is given or paid.", param="kind")
    if len(sent["note"]) > MAX_NOTE_CHARS or not sent["note"].isprintable():
        raise InvalidRequest(
            f"A note has at most {MAX_NOTE_CHARS} printable characters.", param="note"
        )
    if not 0 < len(sent["grant_id"]) <= 64 or not sent["grant_id"].isprintable():
        raise InvalidRequest("This form is out of date. Reload the page and send it again.")


router = Router(
    "", route_handlers=[list_organizations, show_organization, change_limit, give_credit]
)
