"""Credit: lots paid ahead or given, how usage uses them up, and how they end.

Owns the lots and their postings. Usage uses them up in `posting.py`, with `draw` from here.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import (
    BREAKAGE,
    PROMOTIONAL_COST,
    credit_account,
    is_posted,
    lock_account,
    on_account,
    post,
)
from app.billing.payments.invoice_payments import asked_for_nano
from app.billing.tables import MAX_BALANCE_NANO, CreditLot, LotUse
from app.core import clock
from app.core.errors import Conflict
from app.core.ids import new_id
from app.core.money import format_nano, write_amount


class Draw(NamedTuple):
    """What is taken from one lot."""

    lot_id: str
    kind: str
    amount_nano: int


class LotState(NamedTuple):
    """A lot with something left, as `posting.py` reads it, in the order of use. `is_over`: its
    time is, and what is left waits to be taken away."""

    id: str
    kind: str
    remaining_nano: int
    is_over: bool = False


def promised_to(limit_nano: int | None, posted_nano: int, held_nano: int, in_lots_nano: int) -> int:
    """How much of an account's credit its running requests were promised: what they hold, as far
    as its limit does not cover that beside what is owed. Nothing without a limit."""
    if limit_nano is None:
        return 0
    owed_nano = in_lots_nano - posted_nano
    return min(held_nano, max(0, held_nano + owed_nano - limit_nano))


def draw(lots: Sequence[LotState], amount_nano: int, promised_nano: int) -> list[Draw]:
    """How `amount_nano` is taken from lots given in the order of use. What they do not cover is
    owed on account. Lots whose time is over pay only for what requests were promised of them, as
    `expire_due` leaves it: the part of `promised_nano` that the other lots do not cover."""
    over_nano = promised_nano - sum(lot.remaining_nano for lot in lots if not lot.is_over)
    draws: list[Draw] = []
    for lot in lots:
        if amount_nano <= 0:
            break
        taken = min(lot.remaining_nano, amount_nano)
        if lot.is_over:
            taken = min(taken, over_nano)
        if taken > 0:
            draws.append(Draw(lot.id, lot.kind, taken))
            amount_nano -= taken
            over_nano -= taken if lot.is_over else 0
    return draws


async def add_lot(
    session: AsyncSession,
    organization_id: str,
    kind: str,
    amount_nano: int,
    *,
    source: str,
    currency: str,
    from_account: str,
    priority: int = 50,
    expires_at: datetime | None = None,
    note: str = "",
) -> str | None:
    """Adds credit that `from_account` pays for (`STRIPE_CLEARING`, `PROMOTIONAL_COST`). Returns
    the lot's id, or None when this `source` has given its credit before.

    A prepaid account (limit 0) that owes something, as after a dispute, pays that first: nobody
    sends it an invoice. But not what an invoice from before it was prepaid asks for: that is paid
    as an invoice, or it could be paid twice. Raises `Conflict` for another currency than the
    account's, and for more than an account holds.
    """
    assert amount_nano > 0
    account = await lock_account(session, organization_id, currency)
    if await is_posted(session, f"credit:{source}"):
        return None
    if account.currency != currency:
        raise Conflict(
            f"This account is kept in {account.currency.upper()}: credit in {currency.upper()} "
            "cannot be added to it.",
            code="currency_differs",
        )
    if account.posted_nano + amount_nano > MAX_BALANCE_NANO:
        raise Conflict(
            f"An account holds at most {format_nano(MAX_BALANCE_NANO, currency)}.",
            code="balance_too_large",
        )
    owed_nano = 0
    if account.credit_limit_nano == 0 and kind == "paid":
        in_lots = sum(lot.remaining_nano for lot in await open_lots(session, organization_id))
        owed_nano = in_lots - account.posted_nano - await asked_for_nano(session, organization_id)
        owed_nano = min(amount_nano, max(0, owed_nano))
    entries = {from_account: -amount_nano, on_account(organization_id): owed_nano}
    entries[credit_account(organization_id, kind)] = amount_nano - owed_nano
    transaction_id = await post(
        session,
        key=f"credit:{source}",
        kind="credit",
        organization_id=organization_id,
        currency=currency,
        entries={name: nano for name, nano in entries.items() if nano},
    )
    assert transaction_id is not None, "looked for above, under the lock"
    lot_id = new_id("lot")
    session.add(
        CreditLot(
            id=lot_id,
            organization_id=organization_id,
            kind=kind,
            amount_nano=amount_nano,
            remaining_nano=amount_nano - owed_nano,
            priority=priority,
            source=source,
            note=note,
            expires_at=expires_at,
            created_at=clock.now(),
        )
    )
    await session.flush()
    return lot_id


async def is_given(session: AsyncSession, source: str) -> bool:
    """Whether this source has given its credit. Certain where the account is locked."""
    return await session.scalar(select(CreditLot.id).where(CreditLot.source == source)) is not None


async def require_same_lot(
    session: AsyncSession,
    source: str,
    kind: str,
    amount_nano: int,
    *,
    priority: int = 50,
    expires_at: datetime | None = None,
    note: str = "",
) -> CreditLot:
    """The lot of this source. Raises `Conflict` if it is other credit than was asked for now."""
    lot = (await session.scalars(select(CreditLot).where(CreditLot.source == source))).one()
    given = (lot.kind, lot.amount_nano, lot.priority, lot.expires_at, lot.note)
    if given != (kind, amount_nano, priority, expires_at, note):
        ends = "no end" if lot.expires_at is None else f"until {lot.expires_at:%Y-%m-%d %H:%M} UTC"
        raise Conflict(
            f"Other credit was given under this key: {write_amount(lot.amount_nano)} "
            f"({lot.kind}, priority {lot.priority}, {ends}, note {lot.note!r}). To give more, use "
            "a new one.",
            code="idempotency_key_reused",
        )
    return lot


async def take_back(
    session: AsyncSession,
    *,
    source: str,
    amount_nano: int,
    key: str,
    kind: str,
    to_account: str,
) -> str | None:
    """Undoes part of a lot, for a refund or a dispute: from what is left of it, the rest is owed
    on account. Returns the posting's id, or None when `key` was posted before. `source` must be
    that of an existing lot."""
    query = select(CreditLot).where(CreditLot.source == source)
    lot = (await session.scalars(query)).one()
    account = await lock_account(session, lot.organization_id, "")
    await session.refresh(lot)
    from_lot = min(lot.remaining_nano, amount_nano)
    entries = {
        to_account: amount_nano,
        credit_account(lot.organization_id, lot.kind): -from_lot,
        on_account(lot.organization_id): from_lot - amount_nano,
    }
    return await _post_from_lot(session, lot, from_lot, entries, key, kind, account.currency)


async def expire_due(session: AsyncSession, lot_id: str) -> str | None:
    """Ends what is left of a lot whose time is over. What running requests were promised of it
    waits for their settlement. Returns the posting's id if there was one."""
    lot = await session.get(CreditLot, lot_id)
    assert lot is not None
    account = await lock_account(session, lot.organization_id, "")
    await session.refresh(lot)
    if lot.expires_at is None or lot.expires_at > clock.now():
        return None
    # Not the balance: credit ends whatever else is owed.
    lots = await open_lots(session, lot.organization_id)
    in_lots = sum(each.remaining_nano for each in lots)
    promised_nano = promised_to(
        account.credit_limit_nano, account.posted_nano, account.held_nano, in_lots
    )
    amount_nano = min(lot.remaining_nano, max(0, in_lots - promised_nano))
    if amount_nano == 0:
        return None
    to_account = PROMOTIONAL_COST if lot.kind == "promotional" else BREAKAGE
    entries = {
        to_account: amount_nano,
        credit_account(lot.organization_id, lot.kind): -amount_nano,
    }
    # One lot may end in parts, and what was given back to it ends again: its lock, not the key,
    # sees to it that nothing ends twice.
    key = f"expiry:{lot.id}:{new_id('end')}"
    return await _post_from_lot(session, lot, amount_nano, entries, key, "expiry", account.currency)


async def _post_from_lot(
    session: AsyncSession,
    lot: CreditLot,
    from_lot: int,
    entries: dict[str, int],
    key: str,
    kind: str,
    currency: str,
) -> str | None:
    transaction_id = await post(
        session,
        key=key,
        kind=kind,
        organization_id=lot.organization_id,
        currency=currency,
        entries={name: nano for name, nano in entries.items() if nano},
    )
    if transaction_id is None or not from_lot:
        return transaction_id
    await session.execute(
        update(CreditLot)
        .where(CreditLot.id == lot.id)
        .values(remaining_nano=CreditLot.remaining_nano - from_lot)
        .execution_options(synchronize_session=False)
    )
    await session.execute(
        insert(LotUse),
        {"ledger_transaction_id": transaction_id, "lot_id": lot.id, "amount_nano": from_lot},
    )
    await session.refresh(lot)
    return transaction_id


async def open_lots(session: AsyncSession, organization_id: str) -> Sequence[CreditLot]:
    """Lots with something left, in the order of use: priority, expiry, creation."""
    rows = await session.scalars(
        select(CreditLot)
        .where(CreditLot.organization_id == organization_id, CreditLot.remaining_nano > 0)
        .order_by(
            CreditLot.priority,
            CreditLot.expires_at.is_(None),
            CreditLot.expires_at,
            CreditLot.created_at,
            CreditLot.id,
        )
        .execution_options(populate_existing=True)
    )
    return rows.all()


async def due_lots(session: AsyncSession, at: datetime) -> Sequence[str]:
    """Ids of lots that are over and still have something left."""
    rows = await session.scalars(
        select(CreditLot.id).where(CreditLot.remaining_nano > 0, CreditLot.expires_at <= at)
    )
    return rows.all()
