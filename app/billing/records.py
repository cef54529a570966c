"""The box's records of single requests: a receipt wherever it is kept, and its proof.

Owns where they are looked for. Who may ask is the routes' to decide.
"""

import asyncio
from collections import OrderedDict
from datetime import datetime

from sqlalchemy import Connection, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.archive_file import ArchivedTransaction
from app.billing.digests import ReceiptRecord
from app.billing.hash_tree import HashTree
from app.billing.hashed_rows import read_receipts, read_transactions
from app.billing.proofs import Proof, SignedSeal
from app.billing.seal_check import ChainCheck, check_chain
from app.billing.seals import last_seals, place_of, read_seals, sealed_transactions
from app.billing.usage_archive import UsageArchive, detail_from
from app.core.database import Base, create_writer_engine
from app.core.errors import NotFound
from app.metering.receipts import Receipt, ReceiptLine, read_receipt
from app.metering.tables import DIMENSIONS, UsageEvent

TREES_KEPT = 32  # of seals, at most a quarter of a megabyte each

_event = Base.metadata.tables[UsageEvent.__tablename__]


class Records:
    """Reads only. Its methods may be called at the same time."""

    def __init__(self, sync_database_url: str, archive: UsageArchive, public_key: str) -> None:
        engine = create_writer_engine(sync_database_url)
        self._engine = engine.execution_options(sqlite_begin="")  # nothing is written
        self.archive = archive
        self.public_key = public_key
        self._trees: OrderedDict[int, HashTree] = OrderedDict()

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.dispose)

    async def receipt(
        self, session: AsyncSession, organization_id: str, request_id: str
    ) -> Receipt:
        """From the database or, once it has left there, from the archive. Raises `NotFound`."""
        try:
            return await read_receipt(session, organization_id, request_id)
        except NotFound:
            found = await asyncio.to_thread(self.archive.find, request_id)
            record = found and _last_attempt(found.receipts, request_id)
            if record is None or record.organization_id != organization_id:
                raise
            return receipt_of(record)

    async def detail_from(self, detail_days: int) -> datetime:
        """From when on the database has every single request, see `usage_archive.detail_from`."""
        return detail_from(detail_days, await self.archived_until())

    async def archived_until(self) -> datetime:
        """No request that ended or was posted later has left the database."""
        return await asyncio.to_thread(self.archive.archived_until)

    async def heads(self, after: int | None, limit: int) -> list[SignedSeal]:
        """Seals after this number in order, or without one the newest, newest first."""
        return await asyncio.to_thread(self._heads, after, limit)

    def _heads(self, after: int | None, limit: int) -> list[SignedSeal]:
        with self._engine.begin() as connection:
            if after is None:
                return last_seals(connection, limit)
            return read_seals(connection, after, limit)

    async def check(self, after: int, seconds: float) -> ChainCheck:
        """Recomputes the chain from the seal after this number on; see `check_chain`."""
        return await asyncio.to_thread(
            check_chain, self._engine, self.archive, self.public_key, after=after, seconds=seconds
        )

    async def proof(self, organization_id: str, request_id: str) -> Proof | None:
        """None until the request is sealed, and for those settled before receipts were hashed.
        Raises `NotFound` as `receipt` does."""
        return await asyncio.to_thread(self._proof, organization_id, request_id)

    def _proof(self, organization_id: str, request_id: str) -> Proof | None:
        with self._engine.begin() as connection:
            settled = self._settled(connection, request_id)
            if settled is None:
                return None
            record = _last_attempt(settled.receipts, request_id)
            if record is None or record.organization_id != organization_id:
                raise NotFound(f"There is no receipt for {request_id!r}.", code="receipt_not_found")
            place = place_of(connection, settled.id)
            if place is None:
                return None
            seal, position = place
            transaction = read_transactions(connection, [settled.id])[settled.id]
            if not transaction.content_sha256:
                return None
            tree = self._tree(connection, seal.number)
        receipts = HashTree(receipt.canonical for receipt in settled.receipts)
        return Proof(
            receipt=record.canonical.decode(),
            receipt_path=receipts.path(settled.receipts.index(record)),
            transaction=transaction.canonical.decode(),
            transaction_path=tree.path(position),
            seal=seal,
            public_key=self.public_key,
        )

    def _settled(self, connection: Connection, request_id: str) -> ArchivedTransaction | None:
        """All receipts of the transaction that settled a request."""
        transaction_id = connection.scalar(
            select(_event.c.ledger_transaction_id)
            .where(_event.c.request_id == request_id)
            .order_by(_event.c.started_at.desc())
            .limit(1)
        )
        if transaction_id is None:
            return self.archive.find(request_id)
        if not transaction_id:
            return None
        receipts = read_receipts(connection, [transaction_id]).get(transaction_id)
        # In between, it may have gone to the archive.
        if receipts is None:
            return self.archive.find(request_id)
        return ArchivedTransaction(transaction_id, receipts)

    def _tree(self, connection: Connection, seal_number: int) -> HashTree:
        """The transactions of a seal, hashed. They never change."""
        tree = self._trees.pop(seal_number, None)
        if tree is None:
            leaves = sealed_transactions(connection, seal_number)
            tree = HashTree(leaf.canonical for leaf in leaves)
        self._trees[seal_number] = tree
        while len(self._trees) > TREES_KEPT:
            self._trees.popitem(last=False)
        return tree


def _last_attempt(receipts: list[ReceiptRecord], request_id: str) -> ReceiptRecord | None:
    own = [each for each in receipts if each.event_id.rpartition(":")[0] == request_id]
    return max(own, key=lambda each: each.started_at, default=None)


def receipt_of(record: ReceiptRecord) -> Receipt:
    """As its caller sees it."""
    names = ("api_key_name", "route", "service_class", "outcome", "finish_reason", "currency")
    numbers = ("amount_nano", "price_book_id", "duration_ns", "first_token_ns")
    return Receipt(
        request_id=record.event_id.rpartition(":")[0],
        model=record.endpoint_name,
        version=record.version_number,
        started_at=datetime.fromisoformat(record.started_at),
        finished_at=datetime.fromisoformat(record.finished_at),
        lines=sorted(
            (ReceiptLine(*line) for line in record.lines),
            key=lambda line: DIMENSIONS.index(line.dimension),
        ),
        **{name: getattr(record, name) for name in (*names, *numbers)},
    )
