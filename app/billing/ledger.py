"""The ledger: balanced postings, made once, and the account names they use.

Owns postings of people and of Stripe, one at a time; those of requests, many at a time, are
`posting.py`'s. Either locks the organization's account first, so that its money moves in order.
"""

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.currency import require_same
from app.billing.statements import open_statement
from app.billing.tables import (
    AccountBalance,
    LedgerEntry,
    LedgerTransaction,
    UnsealedTransaction,
)
from app.core import clock
from app.core.ids import new_id

REVENUE = "revenue"  # what usage brought in
STRIPE_CLEARING = "stripe_clearing"  # what Stripe holds for us
STRIPE_FEES = "stripe_fees"
PROMOTIONAL_COST = "promotional_cost"  # credit given away
BREAKAGE = "breakage"  # paid credit that expired
BAD_DEBT = "bad_debt"  # invoices given up
OTHER_CLEARING = "other_clearing"  # money that came another way than through Stripe


def on_account(organization_id: str) -> str:
    """What an organization owes (negative) or paid beyond what it owed, without its credit."""
    return f"customer:{organization_id}"


def credit_account(organization_id: str, kind: str) -> str:
    """What is left of its credit of one kind: `paid` or `promotional`."""
    return f"customer:{organization_id}:{kind}"


async def open_account(session: AsyncSession, organization_id: str, currency: str) -> None:
    """An account without limit and with nothing on it, unless there is one."""
    connection = await session.connection()
    await connection.execute(open_statement(connection.dialect.name, organization_id, currency))


async def lock_account(
    session: AsyncSession, organization_id: str, currency: str
) -> AccountBalance:
    """The organization's account, opened if there is none and locked until the transaction ends.
    To be called before anything else that concerns its money is read."""
    await open_account(session, organization_id, currency)
    row = await session.scalar(
        select(AccountBalance)
        .where(AccountBalance.organization_id == organization_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    assert row is not None, "opened above"
    return row


async def is_posted(session: AsyncSession, key: str) -> bool:
    query = select(LedgerTransaction.id).where(LedgerTransaction.idempotency_key == key)
    return (await session.scalar(query)) is not None


async def post(
    session: AsyncSession,
    *,
    key: str,
    kind: str,
    organization_id: str,
    currency: str,
    entries: Mapping[str, int],
) -> str | None:
    """Adds one balanced transaction and moves the organization's balance by what it does to its
    accounts. Returns its id, or None when `key` was posted before, which changes nothing.

    A posting that takes from an account more than running requests leave is made all the same:
    they keep what they were promised, and no further one is admitted. Raises `WrongCurrency`.
    """
    assert sum(entries.values()) == 0, "every posting sums to zero"
    account = await lock_account(session, organization_id, currency)
    require_same(organization_id, account.currency, currency)
    if await is_posted(session, key):
        return None
    transaction_id = new_id("lt")
    at = posting_time(account.closed_until)
    session.add(
        LedgerTransaction(
            id=transaction_id,
            idempotency_key=key,
            kind=kind,
            organization_id=organization_id,
            currency=currency,
            created_at=at,
        )
    )
    await session.flush()  # entries refer to it
    # Queued first: a trigger refuses entries of what is sealed.
    await session.execute(insert(UnsealedTransaction), {"ledger_transaction_id": transaction_id})
    await session.execute(
        insert(LedgerEntry),
        [
            {
                "transaction_id": transaction_id,
                "account": name,
                "amount_nano": amount_nano,
                "created_at": at,
            }
            for name, amount_nano in sorted(entries.items())
        ],
    )
    await _move(session, account, _own(entries, organization_id))
    return transaction_id


def posting_time(closed_until: datetime | None) -> datetime:
    """Now, but not within a month that is invoiced already: what comes late belongs to the next,
    as does everything while the clock is behind."""
    now = clock.now()
    return now if closed_until is None else max(now, closed_until)


def _own(entries: Mapping[str, int], organization_id: str) -> int:
    """What the entries add to the organization's own accounts."""
    own = on_account(organization_id)
    return sum(
        amount_nano
        for name, amount_nano in entries.items()
        if name == own or name.startswith(f"{own}:")
    )


async def _move(session: AsyncSession, account: AccountBalance, change_nano: int) -> None:
    posted_nano = account.posted_nano + change_nano
    await session.execute(
        update(AccountBalance)
        .where(AccountBalance.organization_id == account.organization_id)
        .values(
            posted_nano=posted_nano,
            forced_nano=forced_nano(posted_nano, account.held_nano, account.credit_limit_nano),
        )
        .execution_options(synchronize_session=False)
    )
    await session.refresh(account)


def forced_nano(posted_nano: int, held_nano: int, credit_limit_nano: int | None) -> int:
    """How far an account is below what its running requests were promised."""
    if credit_limit_nano is None or held_nano == 0:
        return 0
    return max(0, held_nano - posted_nano - credit_limit_nano)
