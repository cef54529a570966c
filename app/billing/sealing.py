"""Seals: batches of ledger transactions under one signed hash, each chained to the one before.

Owns the making of seals. Settling only queues its transactions, so nothing waits for a seal; what
is hashed never changes, so it is read and hashed before the short transaction that seals it.
"""

import asyncio
import logging
from datetime import datetime

from sqlalchemy import Connection, Engine, delete, insert, select
from sqlalchemy.exc import IntegrityError

from app.billing.digests import instant_text, merkle_root
from app.billing.hashed_rows import read_transactions
from app.billing.proofs import GENESIS_SHA256, SealRecord
from app.billing.signing import SigningKey
from app.billing.tables import Seal, SealedTransaction, UnsealedTransaction
from app.core import clock
from app.core.database import Base, create_writer_engine
from app.core.failpoints import failpoint

MAX_TRANSACTIONS = 4_096  # in one seal
MAX_ATTEMPTS = 8

log = logging.getLogger(__name__)

_unsealed = Base.metadata.tables[UnsealedTransaction.__tablename__]
_seal = Base.metadata.tables[Seal.__tablename__]
_sealed = Base.metadata.tables[SealedTransaction.__tablename__]


class _Overtaken(Exception):
    """Another process sealed meanwhile."""


class Sealer:
    """Seals what is queued. One per process; several on one database are right together."""

    def __init__(self, sync_database_url: str, key: SigningKey) -> None:
        self._engine = create_writer_engine(sync_database_url)
        self._key = key

    async def turn(self) -> int:
        """Seals all that is queued now; returns how many transactions that were."""
        num_sealed = 0
        while count := await asyncio.to_thread(seal_some, self._engine, self._key):
            num_sealed += count
        return num_sealed

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.dispose)


def seal_all(engine: Engine, key: SigningKey) -> int:
    """Blocks, as `seal_some` does."""
    num_sealed = 0
    while count := seal_some(engine, key):
        num_sealed += count
    return num_sealed


def seal_some(engine: Engine, key: SigningKey, limit: int = MAX_TRANSACTIONS) -> int:
    """Makes one seal of at most `limit` transactions; of none there is none."""
    for _ in range(MAX_ATTEMPTS):
        try:
            return _try_to_seal(engine, key, limit)
        except (_Overtaken, IntegrityError):
            log.info("another process has sealed; it is tried again with what is left")
    return 0


def _try_to_seal(engine: Engine, key: SigningKey, limit: int) -> int:
    # On SQLite without the write lock, which this engine's transactions take otherwise.
    with engine.execution_options(sqlite_begin="").begin() as connection:
        queued = list(connection.scalars(select(_unsealed).limit(limit)))
        if not queued:
            return 0
        number, previous_sha256 = _head(connection)
        records = read_transactions(connection, queued)
    ids = sorted(records, key=lambda name: (records[name].created_at, name))
    if not ids:
        return 0
    now = clock.now()
    record = SealRecord(
        number=number + 1,
        previous_sha256=previous_sha256,
        root_sha256=merkle_root([records[name].canonical for name in ids]).hex(),
        num_transactions=len(ids),
        created_at=instant_text(now),
    )
    with engine.begin() as connection:
        _write(connection, record, key.sign(record.sha256), now, ids)
        failpoint("sealing.before_commit")
    failpoint("sealing.after_commit")
    return len(ids)


def _head(connection: Connection) -> tuple[int, str]:
    """The last seal's number and hash."""
    query = select(_seal.c.number, _seal.c.sha256).order_by(_seal.c.number.desc()).limit(1)
    row = connection.execute(query).first()
    return (0, GENESIS_SHA256) if row is None else (row.number, row.sha256)


def _write(
    connection: Connection, record: SealRecord, signature: str, at: datetime, ids: list[str]
) -> None:
    """The seal first: its number is there once, so that of two writers one waits, then fails.
    Raises `_Overtaken` where it is not the next, or a transaction is sealed already."""
    if _head(connection) != (record.number - 1, record.previous_sha256):
        raise _Overtaken
    connection.execute(
        insert(_seal).values(
            number=record.number,
            previous_sha256=record.previous_sha256,
            root_sha256=record.root_sha256,
            sha256=record.sha256,
            signature=signature,
            num_transactions=record.num_transactions,
            created_at=at,
        )
    )
    queued = _unsealed.c.ledger_transaction_id.in_(ids)
    if connection.execute(delete(_unsealed).where(queued)).rowcount != len(ids):
        raise _Overtaken
    connection.execute(
        insert(_sealed),
        [
            {
                "ledger_transaction_id": name,
                "seal_number": record.number,
                "position": position,
            }
            for position, name in enumerate(ids)
        ],
    )
