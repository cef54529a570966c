"""The whole chain of seals recomputed, from each receipt's lines to the signatures.

Owns what must hold between receipts, ledger and seals, and naming the first thing that does not.
Reads the database and the archive only.
"""

import time

import msgspec
from sqlalchemy import Connection, Engine, exists, func, select

from app.billing.archive_file import DamagedArchive
from app.billing.digests import ReceiptRecord, TransactionRecord, merkle_root
from app.billing.hashed_rows import blocks_of, read_receipts, read_transactions
from app.billing.proofs import GENESIS_SHA256, SignedSeal, wrong_line
from app.billing.seals import read_seals, sealed_ids
from app.billing.signing import is_signed
from app.billing.tables import LedgerTransaction, Seal, SealedTransaction, UnsealedTransaction
from app.billing.usage_archive import Span, UsageArchive
from app.core.database import Base
from app.metering.tables import UsageEvent

TRANSACTIONS_AT_ONCE = 512

_event = Base.metadata.tables[UsageEvent.__tablename__]
_transaction = Base.metadata.tables[LedgerTransaction.__tablename__]
_unsealed = Base.metadata.tables[UnsealedTransaction.__tablename__]
_seal = Base.metadata.tables[Seal.__tablename__]
_sealed = Base.metadata.tables[SealedTransaction.__tablename__]


class ChainCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What was verified up to seal `last_number`, and the first thing that is wrong, if anything.
    `is_complete` is false when time ran out: go on after `last_number`."""

    last_number: int
    num_seals: int
    num_transactions: int
    num_receipts: int
    num_archived: int  # of the receipts
    num_unsealed: int  # transactions that wait for their seal
    is_complete: bool
    problem: str | None


class _Problem(Exception):
    """The first thing that is wrong, in words for the operator."""


class _Counts:
    def __init__(self) -> None:
        self.seals = self.transactions = self.receipts = self.archived = 0


def check_chain(
    engine: Engine,
    archive: UsageArchive,
    public_key: str,
    *,
    after: int = 0,
    seconds: float | None = None,
    looks_for_rest: bool = True,
) -> ChainCheck:
    """Verifies seals in order, each in a transaction of its own, until the last, or one after
    `seconds`. What is in no seal is looked for at the end, through the whole ledger, unless
    `looks_for_rest` is false. Blocks for as long as it takes."""
    ends_at = None if seconds is None else time.monotonic() + seconds
    counts, archived, last = _Counts(), _Archived(archive), after
    problem: str | None = None
    is_complete = False
    try:
        with engine.begin() as connection:
            previous_sha256 = _previous(connection, after)
        while not is_complete and (ends_at is None or time.monotonic() < ends_at):
            with engine.begin() as connection:
                seal = next(iter(read_seals(connection, last, 1)), None)
                if seal is None:
                    is_complete = True
                    if looks_for_rest:
                        _check_rest(connection)
                    break
                _check_head(seal, last + 1, previous_sha256, public_key)
                _check_content(connection, seal, archived, counts)
            last, previous_sha256 = seal.number, seal.sha256
            counts.seals += 1
    except (_Problem, DamagedArchive) as found:
        problem, is_complete = str(found), True
    with engine.begin() as connection:
        num_unsealed = connection.scalar(select(func.count()).select_from(_unsealed)) or 0
    return ChainCheck(
        last_number=last,
        num_seals=counts.seals,
        num_transactions=counts.transactions,
        num_receipts=counts.receipts,
        num_archived=counts.archived,
        num_unsealed=num_unsealed,
        is_complete=is_complete,
        problem=problem,
    )


def _previous(connection: Connection, number: int) -> str:
    if number == 0:
        return GENESIS_SHA256
    found = connection.scalar(select(_seal.c.sha256).where(_seal.c.number == number))
    if found is None:
        raise _Problem(f"there is no seal {number}")
    return found


def _check_head(seal: SignedSeal, number: int, previous_sha256: str, public_key: str) -> None:
    if seal.number != number:
        raise _Problem(f"seal {number} is missing")
    if seal.previous_sha256 != previous_sha256:
        raise _Problem(f"seal {number} does not follow the one before: its previous hash differs")
    if seal.record.sha256 != seal.sha256:
        raise _Problem(f"the hash of seal {number} is not that of what it says")
    if not is_signed(public_key, seal.sha256, seal.signature):
        raise _Problem(f"seal {number} is not signed by the key {public_key}")


def _check_content(
    connection: Connection, seal: SignedSeal, archived: "_Archived", counts: _Counts
) -> None:
    places = sealed_ids(connection, seal.number)
    if [position for position, _ in places] != list(range(seal.num_transactions)):
        raise _Problem(
            f"seal {seal.number} is of {seal.num_transactions} transactions, but {len(places)} "
            "are marked as its"
        )
    leaves: list[bytes] = []
    for some in blocks_of([name for _, name in places], TRANSACTIONS_AT_ONCE):
        records = read_transactions(connection, some)
        receipts = read_receipts(connection, some)
        for name in some:
            if name not in records:
                raise _Problem(f"ledger transaction {name} of seal {seal.number} is gone")
            record = records[name]
            leaves.append(record.canonical)
            own = receipts.get(name)
            if own is None and record.kind == "usage":
                own = archived.receipts(seal.number, name)
                counts.archived += len(own or ())
            _check_transaction(record, own or [])
            counts.receipts += len(own or ())
    if merkle_root(leaves).hex() != seal.root_sha256:
        raise _Problem(
            f"a ledger transaction of seal {seal.number}, or an entry of one, is not what was "
            "sealed: the root differs"
        )
    counts.transactions += len(places)


def _check_transaction(record: TransactionRecord, receipts: list[ReceiptRecord]) -> None:
    if sum(amount_nano for _, amount_nano in record.entries):
        raise _Problem(f"the entries of ledger transaction {record.id} do not sum to zero")
    for receipt in receipts:
        if wrong := wrong_line(receipt):
            raise _Problem(f"event {receipt.event_id}: {wrong}")
        if receipt.organization_id != record.organization_id and record.organization_id:
            raise _Problem(f"event {receipt.event_id} is of another organization than its posting")
    if not record.content_sha256:
        return
    root = merkle_root([receipt.canonical for receipt in receipts]).hex()
    if root != record.content_sha256:
        what = "is not what was posted" if receipts else "is gone"
        raise _Problem(
            f"an event of ledger transaction {record.id} {what}: the receipts' root differs"
        )
    own = f"customer:{record.organization_id}"
    charged = -sum(
        amount_nano
        for account, amount_nano in record.entries
        if account == own or account.startswith(f"{own}:")
    )
    if charged != sum(receipt.amount_nano for receipt in receipts):
        raise _Problem(f"ledger transaction {record.id} charges something else than its receipts")


def _check_rest(connection: Connection) -> None:
    """What no seal has must wait for one, and what was charged must have been posted."""
    sealed = exists().where(_sealed.c.ledger_transaction_id == _transaction.c.id)
    waiting = exists().where(_unsealed.c.ledger_transaction_id == _transaction.c.id)
    query = select(_transaction.c.id).where(~sealed, ~waiting).limit(1)
    if (name := connection.scalar(query)) is not None:
        raise _Problem(f"ledger transaction {name} is in no seal, and does not wait for one")
    posted = exists().where(_transaction.c.id == _event.c.ledger_transaction_id)
    query = select(_event.c.id).where(_event.c.ledger_transaction_id != "", ~posted).limit(1)
    if (name := connection.scalar(query)) is not None:
        raise _Problem(f"event {name} belongs to a ledger transaction that does not exist")


class _Archived:
    """Receipts out of the archive, which is read along with the seals: both have one order."""

    def __init__(self, archive: UsageArchive) -> None:
        self._archive = archive
        self._span: Span | None = None
        self._receipts: dict[str, list[ReceiptRecord]] = {}

    def receipts(self, seal_number: int, transaction_id: str) -> list[ReceiptRecord] | None:
        span = self._span
        if span is None or not span.first_seal <= seal_number <= span.last_seal:
            self._span = span = self._archive.span_of(seal_number)
            self._receipts = dict(self._archive.transactions(span)) if span else {}
        return self._receipts.get(transaction_id)
