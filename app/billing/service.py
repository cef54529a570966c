"""What people do with an account: read it and set its limit."""

import msgspec
from sqlalchemy import BigInteger, literal, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import open_account
from app.billing.statements import forced_after
from app.billing.tables import AccountBalance
from app.core.errors import Conflict, InvalidRequest
from app.core.money import NANO_PER_UNIT, parse_amount

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
            .values(
                credit_limit_nano=limit_nano,
                forced_nano=forced_after(
                    AccountBalance.posted_nano,
                    AccountBalance.held_nano,
                    literal(limit_nano, BigInteger),
                ),
            )
        )
    except IntegrityError as error:
        raise Conflict(
            "Requests that are running now hold more than this limit allows. "
            "Try again when they are done, or choose a higher limit.",
            param="spending_limit",
        ) from error
