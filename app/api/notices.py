"""Notices over HTTP: what you should know about your money, and who else is told. What brings
them about: `app.billing.payments.watches`."""

from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Router, get, post, put
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody

from app.api.auth import allowed, authenticated, dependencies
from app.api.writing import writing
from app.billing.key_limits import require_no_limit
from app.billing.ledger import lock_account
from app.billing.payments import notices
from app.billing.payments.notice_delivery import check_notify_url
from app.billing.payments.profile import open_profile, read_profile
from app.billing.payments.tables import BillingProfile, Notice
from app.billing.service import MAX_LIMIT_NANO
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.core.money import parse_amount, write_amount
from app.core.security import new_token
from app.organizations.principal import Principal
from app.settings import Settings

AnyRequest = Request[object, object, State]


class NoticeState(msgspec.Struct, frozen=True, kw_only=True):
    """`kind`: low_balance, budget_spent, invoice ... `ended_at`: it is so no longer.
    `delivery_error` is what the last attempt to send it came to."""

    id: str
    kind: str
    message: str
    data: dict[str, Any]
    created_at: datetime
    ended_at: datetime | None
    dismissed_at: datetime | None
    delivered_at: datetime | None
    delivery_error: str


class NoticeList(msgspec.Struct, frozen=True):
    notices: list[NoticeState]


class NewNoticeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`low_balance` is an amount such as "20", below which you are told; null for the box's own
    choice. `url` gets each notice as a signed POST; empty for none. `is_new_secret` ends the
    secret that signs them and makes another."""

    url: str
    low_balance: str | None = None
    is_new_secret: bool = False


class NoticeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`secret` signs what is sent to `url`: header `Tapeout-Signature: t=<unix time>,v1=<hex>`,
    the HMAC-SHA-256 of the time, a dot, and the body."""

    url: str
    secret: str
    low_balance: str | None


@get("/notices", guards=[allowed("read")], summary="List notices")
async def list_notices(
    request: AnyRequest, principal: NamedDependency[Principal], shown: FromQuery[bool] = False
) -> NoticeList:
    """The newest first; with `shown=true` only those that are so still and were not dismissed."""
    organization_id = principal.organization_id
    async with _database(request).read() as session:
        if shown:
            rows = await notices.shown_notices(session, organization_id)
        else:
            rows = await notices.all_notices(session, organization_id)
    return NoticeList([_notice(row) for row in rows])


@post(
    "/notices/{notice_id:str}/dismiss",
    guards=[allowed("admin")],
    status_code=200,
    summary="Dismiss a notice",
)
async def dismiss_notice(
    request: AnyRequest, principal: NamedDependency[Principal], notice_id: FromPath[str]
) -> None:
    """It is no longer shown to anybody of your organization."""
    async with writing(request, principal, "admin") as session:
        await notices.dismiss(session, principal.organization_id, notice_id)


@get("/notices/settings", guards=[allowed("admin")], summary="Show who is told")
async def show_settings(
    request: AnyRequest, principal: NamedDependency[Principal]
) -> NoticeSettings:
    """With the secret that the address checks signatures by, which a key with a spending limit is
    not told."""
    async with _database(request).read() as session:
        await require_no_limit(session, principal)
        return _settings(await read_profile(session, principal.organization_id))


@put("/notices/settings", guards=[allowed("admin")], summary="Set who is told")
async def set_settings(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[NewNoticeSettings]
) -> NoticeSettings:
    """The address must be https and on the public internet, but for the operator's. It should
    answer with 2xx within ten seconds; else it is told again, for three days, so that one notice
    may come more than once: its `id` stays the same."""
    url = check_notify_url(data.url, is_operator=principal.is_operator)
    low_balance_nano = _parsed(data.low_balance)
    settings: Settings = request.app.state.settings
    async with writing(request, principal, "admin") as session:
        await lock_account(session, principal.organization_id, settings.currency)
        profile = await open_profile(session, principal.organization_id)
        profile.notify_url, profile.low_balance_nano = url, low_balance_nano
        if url and (not profile.notify_secret or data.is_new_secret):
            profile.notify_secret = f"nsec_{new_token()}"
        profile.updated_at = clock.now()
        return _settings(profile)


def _parsed(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        nano = parse_amount(text)
    except ValueError as error:
        raise InvalidRequest(f"low_balance is not {error}.", param="low_balance") from None
    if nano > MAX_LIMIT_NANO:
        raise InvalidRequest("low_balance is at most a billion.", param="low_balance")
    return nano


def _settings(profile: BillingProfile) -> NoticeSettings:
    nano = profile.low_balance_nano
    return NoticeSettings(
        url=profile.notify_url,
        secret=profile.notify_secret,
        low_balance=None if nano is None else write_amount(nano),
    )


def _notice(notice: Notice) -> NoticeState:
    fields: dict[str, Any] = {name: getattr(notice, name) for name in NoticeState.__struct_fields__}
    return NoticeState(**fields)


def _database(request: AnyRequest) -> Database:
    database: Database = request.app.state.database
    return database


router = Router(
    "/api",
    route_handlers=[list_notices, dismiss_notice, show_settings, set_settings],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Notices"],
)
