"""Giving back what a refund or a dispute took, once it has failed or was won.

Owns that posting alone. Taking is `credits.take_back`'s.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import credit_account, is_posted, on_account, post
from app.billing.tables import CreditLot, LedgerEntry, LedgerTransaction, LotUse


class _Parts(NamedTuple):
    """What postings took, less what others gave back: of a lot, and on account."""

    organization_id: str
    currency: str
    on_account_nano: int
    lot_id: str | None
    from_lot_nano: int


async def give_back(
    session: AsyncSession,
    *,
    taken_keys: Sequence[str],
    given_keys: Sequence[str] = (),
    amount_nano: int,
    key: str,
    kind: str,
    from_account: str,
) -> str | None:
    """Undoes all or part of what the postings `taken_keys` took of one payment and `given_keys`
    have not given back yet: first what is left owed on account, then what was taken from the
    payment's lot. Returns the posting's id, or None when `key` was posted before. The caller has
    locked the account."""
    if await is_posted(session, key):
        return None
    taken = await _parts(session, taken_keys, given_keys)
    owner, lot_id = on_account(taken.organization_id), taken.lot_id
    owed_nano = max(0, taken.on_account_nano)
    from_lot = min(max(0, taken.from_lot_nano), max(0, amount_nano - owed_nano))
    entries = {from_account: -amount_nano, owner: amount_nano - from_lot}
    if lot_id is not None and from_lot:
        lot = await session.get_one(CreditLot, lot_id)
        entries[credit_account(taken.organization_id, lot.kind)] = from_lot
    transaction_id = await post(
        session,
        key=key,
        kind=kind,
        organization_id=taken.organization_id,
        currency=taken.currency,
        entries={name: nano for name, nano in entries.items() if nano},
    )
    assert transaction_id is not None, "looked for above, under the lock"
    if lot_id is not None and from_lot:
        await session.execute(
            update(CreditLot)
            .where(CreditLot.id == lot_id)
            .values(remaining_nano=CreditLot.remaining_nano + from_lot)
        )
        await session.execute(
            insert(LotUse),
            {
                "ledger_transaction_id": transaction_id,
                "lot_id": lot_id,
                "amount_nano": -from_lot,
            },
        )
    return transaction_id


async def _parts(
    session: AsyncSession, taken_keys: Sequence[str], given_keys: Sequence[str]
) -> _Parts:
    query = select(LedgerTransaction).where(
        LedgerTransaction.idempotency_key.in_([*taken_keys, *given_keys])
    )
    transactions = (await session.scalars(query)).all()
    first = transactions[0]
    ids = [transaction.id for transaction in transactions]
    on_account_nano = await session.scalar(
        select(func.sum(LedgerEntry.amount_nano)).where(
            LedgerEntry.transaction_id.in_(ids),
            LedgerEntry.account == on_account(first.organization_id),
        )
    )
    used = await session.scalars(select(LotUse).where(LotUse.ledger_transaction_id.in_(ids)))
    uses = used.all()
    return _Parts(
        organization_id=first.organization_id,
        currency=first.currency,
        on_account_nano=-int(on_account_nano or 0),
        lot_id=uses[0].lot_id if uses else None,
        from_lot_nano=sum(use.amount_nano for use in uses),
    )
