"""The pages of API keys: listing, making (the secret is shown once), limiting and revoking them."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from litestar import Response, Router, get, post
from litestar.params import FromPath
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.writing import writing
from app.billing.budgets import BudgetView, delete_budget
from app.billing.key_limits import key_budgets, limit_key
from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, page
from app.core import clock
from app.core.database import Database
from app.core.errors import AppError, InvalidRequest, NotFound
from app.core.money import parse_amount
from app.organizations.keys import (
    ENVIRONMENT_KEY_ID,
    create_key_by,
    get_key,
    list_keys,
    revoke_key,
)
from app.organizations.principal import SCOPE_MEANINGS
from app.organizations.tables import ApiKey
from app.settings import Settings

HERE = "/console/keys"
ON_A_DAY = "day"
EXPIRIES = {
    "": "Never",
    "1": "In a day",
    "30": "In 30 days",
    "90": "In 90 days",
    "365": "In a year",
    ON_A_DAY: "On the day below",
}
PERIODS = {"month": "month", "day": "day"}


class KeyForm(msgspec.Struct, frozen=True):
    """What the form holds; sensible for a program that only calls."""

    name: str = ""
    scopes: frozenset[str] = frozenset({"inference"})
    expiry: str = ""
    expires_on: str = ""
    limit: str = ""
    period: str = "month"


@get("/keys")
async def show_keys(request: PageRequest) -> Response[str]:
    """Every key of the organization."""
    return await _keys_page(request, KeyForm())


@post("/keys", status_code=200)
async def make_key(request: PageRequest) -> Response[str]:
    """Shows the new secret in the answer itself: it is kept nowhere that a redirect could reach."""
    principal = signed_in(request).principal
    principal.require("admin")
    texts = ("name", "expiry", "expires_on", "limit")
    sent = {name: await form_field(request, name) for name in texts}
    form = KeyForm(
        scopes=frozenset(str(scope) for scope in (await request.form()).getall("scope", [])),
        period=await form_field(request, "period") or "month",
        **sent,
    )
    settings: Settings = request.app.state.settings
    try:
        expires_at = _expiry(form)
        limit_nano = _limit(form.limit) if form.limit.strip() else None
        async with writing(request, principal, "admin") as session:
            made, secret = await create_key_by(
                session, principal, form.name, form.scopes, expires_at
            )
            if limit_nano is not None:
                await limit_key(session, made, form.period, limit_nano, currency=settings.currency)
    except InvalidRequest as error:
        return await _keys_page(request, form, error=error)
    return await _keys_page(request, KeyForm(), made=made, secret=secret)


@get("/keys/{key_id:str}")
async def show_key(request: PageRequest, key_id: FromPath[str]) -> Response[str]:
    """One key: what it may do, until when, for how much."""
    return await _key_page(request, key_id)


@post("/keys/{key_id:str}/limit", status_code=200)
async def change_limit(request: PageRequest, key_id: FromPath[str]) -> Response[Any]:
    """What the key may spend in a day or a month; an empty field takes the limit away."""
    principal = signed_in(request).principal
    principal.require("admin")
    period = await form_field(request, "period")
    text = (await form_field(request, "limit")).strip()
    settings: Settings = request.app.state.settings
    try:
        async with writing(request, principal, "admin") as session:
            key = await get_key(session, principal.organization_id, key_id)
            if text:
                await limit_key(session, key, period, _limit(text), currency=settings.currency)
            else:
                for budget in await _budgets_of(session, key):
                    if budget.period == period:
                        await delete_budget(session, key.organization_id, budget.id)
    except InvalidRequest as error:
        return await _key_page(request, key_id, error=error, sent={"limit": text, "period": period})
    return go(request, f"{HERE}/{key_id}?notice={'budget' if text else 'budget-gone'}")


@get("/keys/{key_id:str}/revoke")
async def ask_revoke(request: PageRequest, key_id: FromPath[str]) -> Response[str]:
    """What revoking does, and the form that does it."""
    keys, _ = await _read_keys(request)
    key = next((key for key in keys if key.id == key_id), None)
    if key is None:
        raise NotFound("There is no such key.")
    return page(request, "keys/revoke.html", key=key)


@post("/keys/{key_id:str}/revoke", status_code=200)
async def revoke(request: PageRequest, key_id: FromPath[str]) -> Response[Any]:
    """Makes a key useless for good."""
    principal = signed_in(request).principal
    principal.require("admin")
    async with writing(request, principal, "admin") as session:
        await revoke_key(session, principal.organization_id, key_id)
    return go(request, f"{HERE}?notice=revoked")


async def _keys_page(
    request: PageRequest,
    form: KeyForm,
    *,
    made: ApiKey | None = None,
    secret: str = "",
    error: AppError | None = None,
) -> Response[str]:
    settings: Settings = request.app.state.settings
    keys, limits = await _read_keys(request)
    return page(
        request,
        "keys/keys.html",
        status_code=error.status if error else 200,
        keys=keys,
        limits=limits,
        currency=settings.currency,
        environment_key_id=ENVIRONMENT_KEY_ID,
        now=clock.now(),
        tomorrow=_tomorrow(),
        scopes=SCOPE_MEANINGS,
        expiries=EXPIRIES,
        periods=PERIODS,
        form=form,
        made=made,
        secret=secret,
        error=error.message if error else "",
    )


async def _key_page(
    request: PageRequest,
    key_id: str,
    *,
    error: AppError | None = None,
    sent: dict[str, str] | None = None,
) -> Response[str]:
    principal = signed_in(request).principal
    principal.require("admin")
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    async with database.read() as session:
        key = await get_key(session, principal.organization_id, key_id)
        limits = await _budgets_of(session, key)
    return page(
        request,
        "keys/key.html",
        status_code=error.status if error else 200,
        key=key,
        limits=limits,
        currency=settings.currency,
        is_of_environment=key.id == ENVIRONMENT_KEY_ID,
        now=clock.now(),
        scopes=SCOPE_MEANINGS,
        periods=PERIODS,
        held={"limit": "", "period": "month"} | (sent or {}),
        error=error.message if error else "",
    )


async def _budgets_of(session: AsyncSession, key: ApiKey) -> list[BudgetView]:
    return (await key_budgets(session, key.organization_id)).get(key.id, [])


async def _read_keys(request: PageRequest) -> tuple[list[ApiKey], dict[str, list[BudgetView]]]:
    """Usable keys first; and what limits them, by key."""
    principal = signed_in(request).principal
    principal.require("admin")
    database: Database = request.app.state.database
    async with database.read() as session:
        keys = await list_keys(session, principal.organization_id)
        limits = await key_budgets(session, principal.organization_id)
    return sorted(keys, key=lambda key: key.revoked_at is not None), limits


def _expiry(form: KeyForm) -> datetime | None:
    """The day that is chosen begins without the key."""
    if form.expiry not in EXPIRIES:
        raise InvalidRequest("Choose when the key expires from the list.", param="expiry")
    if form.expiry != ON_A_DAY:
        return clock.now() + timedelta(days=int(form.expiry)) if form.expiry else None
    try:
        return datetime.fromisoformat(form.expires_on).replace(tzinfo=UTC)
    except ValueError:
        raise InvalidRequest(
            "Give the day on which the key expires, such as 2027-01-31.", param="expires_on"
        ) from None


def _limit(text: str) -> int:
    try:
        return parse_amount(text)
    except ValueError as error:
        raise InvalidRequest(f"A limit is {error}.", param="limit") from None


def _tomorrow() -> str:
    return (clock.now() + timedelta(days=1)).date().isoformat()


router = Router(
    "", route_handlers=[show_keys, make_key, show_key, change_limit, ask_revoke, revoke]
)
