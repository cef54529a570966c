"""Seals as they are read: heads of the chain, and what stands in one.

Making them is `sealing.py`'s, verifying all of them `seal_check.py`'s.
"""

from typing import Any

from sqlalchemy import Connection, Row, select

from app.billing.digests import TransactionRecord, instant_text
from app.billing.hashed_rows import read_transactions
from app.billing.proofs import SignedSeal
from app.billing.tables import Seal, SealedTransaction
from app.core.database import Base

_seal = Base.metadata.tables[Seal.__tablename__]
_sealed = Base.metadata.tables[SealedTransaction.__tablename__]


def read_seals(connection: Connection, after: int, limit: int) -> list[SignedSeal]:
    """The next seals after this number, in order."""
    query = select(_seal).where(_seal.c.number > after).order_by(_seal.c.number).limit(limit)
    return [signed_seal(row) for row in connection.execute(query)]


def last_seals(connection: Connection, limit: int) -> list[SignedSeal]:
    """The newest seals, newest first."""
    query = select(_seal).order_by(_seal.c.number.desc()).limit(limit)
    return [signed_seal(row) for row in connection.execute(query)]


def place_of(connection: Connection, transaction_id: str) -> tuple[SignedSeal, int] | None:
    """The seal that has a transaction, and its position there."""
    row = connection.execute(
        select(_seal, _sealed.c.position)
        .join(_sealed, _sealed.c.seal_number == _seal.c.number)
        .where(_sealed.c.ledger_transaction_id == transaction_id)
    ).first()
    return None if row is None else (signed_seal(row), row.position)


def sealed_ids(connection: Connection, seal_number: int) -> list[tuple[int, str]]:
    """Positions and ledger transactions of a seal, in order."""
    query = (
        select(_sealed.c.position, _sealed.c.ledger_transaction_id)
        .where(_sealed.c.seal_number == seal_number)
        .order_by(_sealed.c.position)
    )
    return [(position, name) for position, name in connection.execute(query)]


def sealed_transactions(connection: Connection, seal_number: int) -> list[TransactionRecord]:
    """The leaves of a seal's tree; those that are gone are left out."""
    ids = [name for _, name in sealed_ids(connection, seal_number)]
    records = read_transactions(connection, ids)
    return [records[name] for name in ids if name in records]


def signed_seal(row: Row[*tuple[Any, ...]]) -> SignedSeal:
    return SignedSeal(
        number=row.number,
        previous_sha256=row.previous_sha256,
        root_sha256=row.root_sha256,
        num_transactions=row.num_transactions,
        created_at=instant_text(row.created_at),
        sha256=row.sha256,
        signature=row.signature,
    )
