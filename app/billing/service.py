"""What people do with money: read an account, set its limit, change the prices."""

from collections.abc import Sequence
from datetime import datetime

import msgspec
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.accounts import open_account
from app.billing.prices import ANY_ENDPOINT, Item, add_book
from app.billing.tables import AccountBalance, PriceBook
from app.core import clock
from app.core.errors import Conflict, InvalidRequest
from app.core.money import NANO_PER_UNIT, parse_amount
from app.metering.tables import DIMENSIONS

SERVICE_CLASSES = ("standard", "priority", "batch")
MAX_PRICE_NANO = 10**15  # a million of the currency per unit scale
MAX_UNIT_SCALE = 10**15
MAX_ITEMS = 10_000
MAX_LIMIT_NANO = 10**9 * NANO_PER_UNIT  # a billion, so that sums stay far from 64 bits


class Account(msgspec.Struct, frozen=True):
    """Where an organization stands. `owed_nano` is negative when it has paid ahead."""

    currency: str
    owed_nano: int
    held_nano: int
    spending_limit_nano: int | None


async def read_account(session: AsyncSession, organization_id: str, currency: str) -> Account:
    """An organization that never used anything owes nothing, in the box's currency."""
    row = await session.get(AccountBalance, organization_id)
    if row is None:
        return Account(currency, 0, 0, None)
    return Account(row.currency, -row.posted_nano, row.held_nano, row.credit_limit_nano)


def parse_spending_limit(text: str) -> int:
    """Nano-units from an amount as people write it. Raises `InvalidRequest`."""
    try:
        limit_nano = parse_amount(text)
    except ValueError as error:
        raise InvalidRequest(f"A spending limit is {error}.", param="spending_limit") from None
    if limit_nano > MAX_LIMIT_NANO:
        raise InvalidRequest(
            "A spending limit is at most a billion; for more, set none.", param="spending_limit"
        )
    return limit_nano


async def set_spending_limit(
    session: AsyncSession, organization_id: str, limit_nano: int | None, currency: str
) -> None:
    """How much the organization may owe; None without limit. A limit below what is owed already
    only stops further requests. Raises `Conflict` while running requests hold more than it
    allows, because what was promised to them cannot be taken back."""
    await open_account(session, organization_id, currency)
    try:
        await session.execute(
            update(AccountBalance)
            .where(AccountBalance.organization_id == organization_id)
            .values(credit_limit_nano=limit_nano)
        )
    except IntegrityError as error:
        raise Conflict(
            "Requests that are running now hold more than this limit allows. "
            "Try again when they are done, or choose a higher limit.",
            param="spending_limit",
        ) from error


async def change_prices(
    session: AsyncSession,
    items: Sequence[Item],
    currency: str,
    effective_at: datetime | None = None,
) -> PriceBook:
    """Adds a whole new book; books in force before are never altered. It takes effect at once
    or at `effective_at`. Call `PriceTable.refresh` after the transaction."""
    check_items(items)
    now = clock.now()
    newest = await session.scalar(select(func.max(PriceBook.number)))
    last_start = await session.scalar(select(func.max(PriceBook.effective_at)))
    start = effective_at or now
    if start < now and effective_at is not None:
        raise InvalidRequest("A price book cannot take effect in the past.", param="effective_at")
    if last_start is not None and start < last_start:
        raise Conflict(
            f"A later price book already starts at {last_start.isoformat()}.",
            param="effective_at",
        )
    return await add_book(session, (newest or 0) + 1, currency, list(items), start)


def check_items(items: Sequence[Item]) -> None:
    """Raises `InvalidRequest` naming the first item that cannot be a price."""
    if not 0 < len(items) <= MAX_ITEMS:
        raise InvalidRequest(f"A price book has 1 to {MAX_ITEMS:,} items.", param="items")
    seen: set[tuple[str, str, str]] = set()
    for i, item in enumerate(items):
        key = (item.endpoint_name, item.dimension, item.service_class)
        _require(item.dimension in DIMENSIONS, i, "dimension", f"one of {', '.join(DIMENSIONS)}")
        _require(
            item.service_class in SERVICE_CLASSES,
            i,
            "service_class",
            f"one of {', '.join(SERVICE_CLASSES)}",
        )
        _require(0 <= item.price_nano <= MAX_PRICE_NANO, i, "price_nano", "0 to 10^15")
        _require(0 < item.unit_scale <= MAX_UNIT_SCALE, i, "unit_scale", "1 to 10^15")
        _require(
            0 < len(item.endpoint_name) <= 64,
            i,
            "endpoint_name",
            f"an endpoint's name, or {ANY_ENDPOINT}",
        )
        _require(key not in seen, i, "dimension", "a combination that is not listed twice")
        seen.add(key)


def _require(is_right: bool, index: int, field: str, wanted: str) -> None:
    if not is_right:
        raise InvalidRequest(
            f"items[{index}].{field} must be {wanted}.", param=f"items[{index}].{field}"
        )
