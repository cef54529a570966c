"""Giving back what a refund or a dispute took, once it has failed or was won.

Owns that posting alone. Taking is `credits.take_back`'s.
"""

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import credit_account, is_posted, on_account, post
from app.billing.tables import CreditLot, LedgerEntry, LedgerTransaction, LotUse


async def give_back(
    session: AsyncSession,
    *,
    taken_key: str,
    amount_nano: int,
    key: str,
    kind: str,
    from_account: str,
) -> str | None:
    """Undoes all or part of the posting `taken_key`: first what it left owed on account, then what
    it took from its lot. Returns the posting's id, or None when `key` was posted before. The
    caller has locked the account."""
    if await is_posted(session, key):
        return None
    query = select(LedgerTransaction).where(LedgerTransaction.idempotency_key == taken_key)
    taken = (await session.scalars(query)).one()
    owner = on_account(taken.organization_id)
    owed_nano = -(await _entry(session, taken.id, owner))
    use = await session.scalar(select(LotUse).where(LotUse.ledger_transaction_id == taken.id))
    from_lot = 0 if use is None else min(use.amount_nano, max(0, amount_nano - owed_nano))
    entries = {from_account: -amount_nano, owner: amount_nano - from_lot}
    if use is not None and from_lot:
        lot = await session.get_one(CreditLot, use.lot_id)
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
    if use is not None and from_lot:
        await session.execute(
            update(CreditLot)
            .where(CreditLot.id == use.lot_id)
            .values(remaining_nano=CreditLot.remaining_nano + from_lot)
        )
        await session.execute(
            insert(LotUse),
            {
                "ledger_transaction_id": transaction_id,
                "lot_id": use.lot_id,
                "amount_nano": -from_lot,
            },
        )
    return transaction_id


async def _entry(session: AsyncSession, transaction_id: str, account: str) -> int:
    query = select(LedgerEntry.amount_nano).where(
        LedgerEntry.transaction_id == transaction_id, LedgerEntry.account == account
    )
    return await session.scalar(query) or 0
