"""Organizations and their money over HTTP, for the operator: who there is, how much each may owe,
and credit given to them. And one's own credit, for everybody."""

from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Router, get, patch, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.auth import allowed, authenticated, dependencies
from app.api.writing import writing
from app.billing import credits
from app.billing.ledger import OTHER_CLEARING, PROMOTIONAL_COST, lock_account
from app.billing.service import MAX_LIMIT_NANO, parse_spending_limit, set_spending_limit
from app.billing.standings import Standing, read_standings
from app.billing.tables import CREDIT_KINDS, CreditLot
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest, NotFound
from app.organizations.keys import create_key_in
from app.organizations.principal import SCOPES, Principal
from app.organizations.service import (
    checked_new_name,
    create_organization,
    get_organization,
)
from app.settings import Settings

AnyRequest = Request[object, object, State]
MAX_KEY_CHARS = 64
MAX_NOTE_CHARS = 200
MAX_LISTED = 500
FROM_ACCOUNT = {"promotional": PROMOTIONAL_COST, "paid": OTHER_CLEARING}


class NewOrganization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prepaid unless `spending_limit` is an amount that it may owe, such as "100", or null for no
    limit."""

    name: str
    spending_limit: str | None = "0"


class CreatedOrganization(msgspec.Struct, frozen=True, kw_only=True):
    """`secret` is a key with every scope, shown this once. It expires with the key that made it."""

    organization: Standing
    key_id: str
    secret: str


class LimitChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may be owed: an amount such as "100", null for no limit, "0" for prepaid."""

    spending_limit: str | None


class OrganizationList(msgspec.Struct, frozen=True):
    organizations: list[Standing]


class NewCredit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kind`: promotional, a gift; paid, for money that came another way than through Stripe.
    Credit of a lower `priority` (0 to 100) is used first, then what expires first."""

    amount_nano: int
    kind: str = "promotional"
    expires_at: datetime | None = None
    priority: int = 50
    note: str = ""


class Lot(msgspec.Struct, frozen=True, kw_only=True):
    """Credit that was added at one time. What is left at `expires_at` is lost."""

    id: str
    organization_id: str
    kind: str
    amount_nano: int
    remaining_nano: int
    priority: int
    note: str
    expires_at: datetime | None
    created_at: datetime


class LotList(msgspec.Struct, frozen=True):
    credits: list[Lot]


@get("/organizations", guards=[allowed("admin")], summary="List organizations (operator)")
async def list_organizations(
    request: AnyRequest, principal: NamedDependency[Principal]
) -> OrganizationList:
    """With balance, limit and this month's usage of each."""
    principal.require_operator()
    async with _database(request).read() as session:
        return OrganizationList(await read_standings(session, _currency(request)))


@post(
    "/organizations",
    guards=[allowed("admin")],
    summary="Make an organization (operator)",
)
async def add_organization(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[NewOrganization]
) -> CreatedOrganization:
    """With a first key, which can make others. It may do no more than yours, so that yours needs
    every scope, and expires with it."""
    principal.require_operator()
    limit_nano = _parsed_limit(data.spending_limit)
    async with writing(request, principal, "admin", operator=True) as session:
        name = await checked_new_name(session, data.name)
        organization = await create_organization(session, name)
        await lock_account(session, organization.id, _currency(request))
        await set_spending_limit(session, organization.id, limit_nano, _currency(request))
        key, secret = await create_key_in(session, organization.id, "owner", SCOPES, by=principal)
        standing = await _standing(session, request, organization.id)
    return CreatedOrganization(organization=standing, key_id=key.id, secret=secret)


@patch(
    "/organizations/{organization_id:str}",
    guards=[allowed("admin")],
    summary="Set how much an organization may owe (operator)",
)
async def change_organization(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    organization_id: FromPath[str],
    data: JSONBody[LimitChange],
) -> Standing:
    """A limit below what is owed already only stops further requests."""
    principal.require_operator()
    limit_nano = _parsed_limit(data.spending_limit)
    async with writing(request, principal, "admin", operator=True) as session:
        await get_organization(session, organization_id)
        await lock_account(session, organization_id, _currency(request))
        await set_spending_limit(session, organization_id, limit_nano, _currency(request))
        return await _standing(session, request, organization_id)


@post(
    "/organizations/{organization_id:str}/credits",
    guards=[allowed("admin")],
    summary="Give an organization credit (operator)",
)
async def give_credit(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    organization_id: FromPath[str],
    data: JSONBody[NewCredit],
) -> Lot:
    """Once for each value of the header `Idempotency-Key`, which must be sent: repeating a request
    that was not answered gives nothing twice, also after `expires_at`, and one that asks for other
    credit is refused."""
    principal.require_operator()
    _check_credit(data)
    expires_at = _parsed_end(data.expires_at)
    source = f"grant:{organization_id}:{_idempotency_key(request)}"
    async with writing(request, principal, "admin", operator=True) as session:
        await get_organization(session, organization_id)
        await lock_account(session, organization_id, _currency(request))
        if expires_at and expires_at <= clock.now() and not await credits.is_given(session, source):
            raise InvalidRequest("expires_at lies in the past.", param="expires_at")
        await credits.add_lot(
            session,
            organization_id,
            data.kind,
            data.amount_nano,
            source=source,
            currency=_currency(request),
            from_account=FROM_ACCOUNT[data.kind],
            priority=data.priority,
            expires_at=expires_at,
            note=data.note,
        )
        lot = await credits.require_same_lot(
            session,
            source,
            data.kind,
            data.amount_nano,
            priority=data.priority,
            expires_at=expires_at,
            note=data.note,
        )
        return _shown(lot)


@get("/credits", guards=[allowed("read")], summary="List your credit")
async def list_credits(request: AnyRequest, principal: NamedDependency[Principal]) -> LotList:
    """Used up and expired credit included, the newest first."""
    async with _database(request).read() as session:
        rows = await session.scalars(
            select(CreditLot)
            .where(CreditLot.organization_id == principal.organization_id)
            .order_by(CreditLot.created_at.desc(), CreditLot.id.desc())
            .limit(MAX_LISTED)
        )
        return LotList([_shown(lot) for lot in rows])


def _parsed_limit(text: str | None) -> int | None:
    return None if text is None else parse_spending_limit(text)


def _check_credit(data: NewCredit) -> None:
    if not 0 < data.amount_nano <= MAX_LIMIT_NANO:
        raise InvalidRequest("amount_nano is 1 to 10^18.", param="amount_nano")
    if data.kind not in CREDIT_KINDS:
        raise InvalidRequest(f"kind is one of {', '.join(CREDIT_KINDS)}.", param="kind")
    if not 0 <= data.priority <= 100:
        raise InvalidRequest("priority is 0 (used first) to 100.", param="priority")
    if len(data.note) > MAX_NOTE_CHARS or not data.note.isprintable():
        raise InvalidRequest(
            f"A note has at most {MAX_NOTE_CHARS} printable characters.", param="note"
        )


def _parsed_end(expires_at: datetime | None) -> datetime | None:
    if expires_at is None:
        return None
    try:
        return clock.in_utc(expires_at)
    except ValueError as error:
        raise InvalidRequest(f"expires_at {error}.", param="expires_at") from None


def _idempotency_key(request: AnyRequest) -> str:
    key = request.headers.get("idempotency-key", "").strip()
    if not 0 < len(key) <= MAX_KEY_CHARS or not key.isprintable():
        raise InvalidRequest(
            f"Send the header Idempotency-Key: 1 to {MAX_KEY_CHARS} characters of your choice, "
            "another for each gift.",
            param="Idempotency-Key",
        )
    return key


async def _standing(session: AsyncSession, request: AnyRequest, organization_id: str) -> Standing:
    found = await read_standings(session, _currency(request), organization_id)
    if not found:
        raise NotFound("There is no such organization.")
    return found[0]


def _shown(lot: CreditLot) -> Lot:
    fields: dict[str, Any] = {name: getattr(lot, name) for name in Lot.__struct_fields__}
    return Lot(**fields)


def _database(request: AnyRequest) -> Database:
    database: Database = request.app.state.database
    return database


def _currency(request: AnyRequest) -> str:
    settings: Settings = request.app.state.settings
    return settings.currency


router = Router(
    "/api",
    route_handlers=[
        list_organizations,
        add_organization,
        change_organization,
        give_credit,
        list_credits,
    ],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Organizations"],
)
