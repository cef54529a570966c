"""The file of usage that has left the database: receipts by the column, compressed.

Owns the bytes. A file holds the receipts of the ledger transactions of consecutive seals, in the
order of seals and positions, and gives back the very records that were put in. What can be
computed from the rest (amounts, most ids of transactions) is not kept; docs/receipts.md has the
layout.
"""

import hashlib
import lzma
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate, islice
from typing import Any, BinaryIO, NamedTuple

import msgspec

from app.billing.columns import (
    RANDOM_BYTES,
    IdColumn,
    Numbers,
    Table,
    numbers_in,
    signed_numbers_in,
)
from app.billing.digests import Line, ReceiptRecord, instant_text, merkle_root
from app.core.ids import id_with
from app.core.money import price_of

# Then the header's length in four bytes, its SHA-256, the header, the columns.
MAGIC = b"tapeout usage 2\n"
FIRST_MAGIC = b"tapeout usage 1\n"  # as above, or without the header's SHA-256
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
SHA256_BYTES = 32
WHO = (
    "organization_id",
    "api_key_id",
    "api_key_name",
    "endpoint_name",
    "version_number",
    "route",
    "service_class",
    "price_book_id",
    "currency",
)
NUMBERS = (
    "num_receipts",  # of a transaction
    "attempt",
    "who",
    "ending",
    "shape",
    "started_at",  # microseconds after the id was made
    "rounding",  # of the end, against start and duration
    "duration_ns",
    "first_token_ns",  # plus one; 0 for none
    "quantity",
    "amount_nano",  # of lines that are not quantity x price
)
UNSIGNED = {"num_receipts", "attempt", "who", "ending", "shape"}
OF_EVENTS = ("attempt", "who", "ending", "started_at", "rounding", "duration_ns", "first_token_ns")


class ArchivedTransaction(NamedTuple):
    """The receipts of one ledger transaction, in the order of its tree's leaves."""

    id: str
    receipts: list[ReceiptRecord]


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of itself. `from_ms` to `until_ms` is when its requests' ids were made;
    `odd_ids` is whether there are ids without such a time. `columns` are their lengths in bytes,
    in the file's order, and `sha256` is of all of them. `latest_at` is when the last request ended
    or was posted, as receipts tell instants; empty where no clock that was right tells it."""

    first_seal: int
    last_seal: int
    num_events: int
    num_transactions: int
    from_ms: int
    until_ms: int
    odd_ids: bool
    columns: dict[str, int]
    sha256: str
    latest_at: str = ""


class _Tables(msgspec.Struct, frozen=True):
    """What receipts share, by its place; ids by that of the transaction or request."""

    transaction_ids: dict[int, str]
    odd_ids: dict[int, str]
    who: list[list[Any]]
    endings: list[tuple[str, str]]
    shapes: list[tuple[bool, list[tuple[str, int, int, str]]]]


class DamagedArchive(Exception):
    """A file that is not what was written."""


class ArchiveWriter:
    """Collects receipts, at some tens of bytes each, until the file is made."""

    def __init__(self) -> None:
        self.num_events = 0
        self._transaction_ids: list[str] = []  # empty where the root tells it
        self._ids = IdColumn()
        self._numbers = {name: Numbers() for name in NUMBERS}
        self._who, self._endings, self._shapes = Table(), Table(), Table()

    def add(self, transaction_id: str, receipts: Sequence[ReceiptRecord], root: bytes) -> None:
        """`root` is that of the receipts' tree."""
        self._transaction_ids.append("" if transaction_id == _usual_id(root) else transaction_id)
        self._numbers["num_receipts"].add(len(receipts))
        for receipt in receipts:
            self._add(receipt)
        self.num_events += len(receipts)

    def _add(self, receipt: ReceiptRecord) -> None:
        numbers = self._numbers
        request_id, _, attempt = receipt.event_id.rpartition(":")
        made_ms = self._ids.add(request_id)
        numbers["attempt"].add(int(attempt))
        numbers["who"].add(self._who.index([getattr(receipt, name) for name in WHO]))
        numbers["ending"].add(self._endings.index([receipt.outcome, receipt.finish_reason]))
        started_us, finished_us = (
            _microseconds(receipt.started_at),
            _microseconds(receipt.finished_at),
        )
        numbers["started_at"].add_signed(started_us - made_ms * 1000)
        numbers["rounding"].add_signed(finished_us - started_us - receipt.duration_ns // 1000)
        numbers["duration_ns"].add_signed(receipt.duration_ns)
        first_ns = -1 if receipt.first_token_ns is None else receipt.first_token_ns
        numbers["first_token_ns"].add_signed(first_ns + 1)
        self._add_lines(receipt)

    def _add_lines(self, receipt: ReceiptRecord) -> None:
        lines = receipt.lines
        amounts = [_amount(line[1], line[2], line[3], line[5]) for line in lines]
        is_computed = amounts == [line[4] for line in lines]
        is_computed = is_computed and receipt.amount_nano == sum(line[4] for line in lines)
        shape = [is_computed, [[line[0], line[2], line[3], line[5]] for line in lines]]
        self._numbers["shape"].add(self._shapes.index(shape))
        for line in lines:
            self._numbers["quantity"].add_signed(line[1])
        if not is_computed:
            for amount_nano in (receipt.amount_nano, *(line[4] for line in lines)):
                self._numbers["amount_nano"].add_signed(amount_nano)

    def finish(self, first_seal: int, last_seal: int, latest_at: str) -> bytes:
        """The file's content."""
        ids = self._ids
        tables = {
            "transaction_ids": {
                place: name for place, name in enumerate(self._transaction_ids) if name
            },
            "odd_ids": ids.odd,
            "who": self._who.values,
            "endings": self._endings.values,
            "shapes": self._shapes.values,
        }
        columns = {
            # Nothing can be taken from what is random, and so it can be searched as it is.
            "random": bytes(ids.random),
            "tables": _pressed(msgspec.msgpack.encode(tables)),
            "made_at": _pressed(bytes(ids.steps.data)),
            **{name: _pressed(bytes(column.data)) for name, column in self._numbers.items()},
        }
        body = b"".join(columns.values())
        header = Header(
            first_seal=first_seal,
            last_seal=last_seal,
            num_events=self.num_events,
            num_transactions=len(self._transaction_ids),
            from_ms=ids.from_ms,
            until_ms=ids.until_ms,
            odd_ids=bool(ids.odd),
            columns={name: len(column) for name, column in columns.items()},
            sha256=hashlib.sha256(body).hexdigest(),
            latest_at=latest_at,
        )
        encoded = msgspec.json.encode(header)
        prologue = MAGIC + len(encoded).to_bytes(4) + hashlib.sha256(encoded).digest()
        return prologue + encoded + body


def read_header(file: BinaryIO) -> Header:
    """Leaves the file at the start of its columns. Raises `DamagedArchive`."""
    magic = file.read(len(MAGIC))
    if magic not in (MAGIC, FIRST_MAGIC):
        raise DamagedArchive("this is no file of archived usage")
    num_bytes = int.from_bytes(file.read(4))
    start = file.tell()
    sha256 = file.read(SHA256_BYTES)
    encoded = file.read(num_bytes)
    if sha256 != hashlib.sha256(encoded).digest():
        if magic == MAGIC:
            raise DamagedArchive("the header is damaged: its SHA-256 is another")
        file.seek(start)
        encoded = file.read(num_bytes)
    try:
        return msgspec.json.decode(encoded, type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedArchive(f"the header is damaged: {error}") from error


def read_random(file: BinaryIO) -> bytes:
    """The random bytes of all ids, which come first of the columns. Raises `DamagedArchive`."""
    header = read_header(file)
    column = file.read(header.columns.get("random", 0))
    if len(column) != header.num_events * RANDOM_BYTES:
        raise DamagedArchive("the ids are not as many as the header says")
    return column


def read_transactions(file: BinaryIO) -> Iterator[ArchivedTransaction]:
    """Everything in the file, in its order. Raises `DamagedArchive` before the first."""
    columns = _Columns(file)
    for place, count in enumerate(columns.counts):
        yield columns.transaction(place, count)


def read_transaction_at(file: BinaryIO, event: int) -> ArchivedTransaction:
    """The transaction of the n-th event in the file, without what it takes to make the others.
    Raises `DamagedArchive`."""
    columns = _Columns(file)
    first = 0
    for place, count in enumerate(columns.counts):
        if event < first + count:
            columns.skip(first)
            return columns.transaction(place, count)
        first += count
    raise DamagedArchive("there are fewer requests than the header says")


class _Columns:
    """The columns of a file, read along from the first event to the last."""

    def __init__(self, file: BinaryIO) -> None:
        header = read_header(file)
        body = file.read()
        if hashlib.sha256(body).hexdigest() != header.sha256:
            raise DamagedArchive("the columns are damaged: their SHA-256 is not the header's")
        columns: dict[str, bytes] = {}
        start = 0
        for name, length in header.columns.items():
            columns[name] = body[start : start + length]
            start += length
        self._event = 0
        try:
            self._open(columns)
        except (KeyError, lzma.LZMAError, msgspec.MsgspecError) as error:
            raise DamagedArchive(f"the columns are not as the header says: {error!r}") from error

    def _open(self, columns: dict[str, bytes]) -> None:
        self._random = columns["random"]
        self._tables = msgspec.msgpack.decode(lzma.decompress(columns["tables"]), type=_Tables)
        self._made_ms = accumulate(signed_numbers_in(lzma.decompress(columns["made_at"])))
        self._numbers = {
            name: (numbers_in if name in UNSIGNED else signed_numbers_in)(
                lzma.decompress(columns[name])
            )
            for name in NUMBERS
        }
        self.counts = list(self._numbers["num_receipts"])

    def transaction(self, place: int, count: int) -> ArchivedTransaction:
        """The next, which is the n-th of all."""
        receipts = [self._receipt() for _ in range(count)]
        name = self._tables.transaction_ids.get(place)
        if name is None:
            name = _usual_id(merkle_root([receipt.canonical for receipt in receipts]))
        return ArchivedTransaction(name, receipts)

    def skip(self, count: int) -> None:
        """Goes past so many events."""
        shapes = [self._tables.shapes[each] for each in islice(self._numbers["shape"], count)]
        num_lines = sum(len(kinds) for _, kinds in shapes)
        num_amounts = sum(1 + len(kinds) for is_computed, kinds in shapes if not is_computed)
        for column in (self._made_ms, *(self._numbers[name] for name in OF_EVENTS)):
            _consume(column, count)
        _consume(self._numbers["quantity"], num_lines)
        _consume(self._numbers["amount_nano"], num_amounts)
        self._event += count

    def _receipt(self) -> ReceiptRecord:
        number, tables = self._numbers, self._tables
        made_ms, event = next(self._made_ms), self._event
        self._event += 1
        request_id = tables.odd_ids.get(event)
        if request_id is None:
            random = self._random[event * RANDOM_BYTES : (event + 1) * RANDOM_BYTES]
            request_id = id_with("req", made_ms, random)
        else:
            made_ms = 0
        attempt = next(number["attempt"])
        who = dict(zip(WHO, tables.who[next(number["who"])], strict=True))
        outcome, finish_reason = tables.endings[next(number["ending"])]
        started_us = made_ms * 1000 + next(number["started_at"])
        duration_ns = next(number["duration_ns"])
        finished_us = started_us + duration_ns // 1000 + next(number["rounding"])
        first_token_ns = next(number["first_token_ns"]) - 1
        amount_nano, lines = _lines(number, tables)
        return ReceiptRecord(
            event_id=f"{request_id}:{attempt}",
            **who,
            outcome=outcome,
            finish_reason=finish_reason,
            amount_nano=amount_nano,
            started_at=instant_text(EPOCH + started_us * MICROSECOND),
            finished_at=instant_text(EPOCH + finished_us * MICROSECOND),
            duration_ns=duration_ns,
            first_token_ns=None if first_token_ns == -1 else first_token_ns,
            lines=lines,
        )


def _consume(numbers: Iterator[int], count: int) -> None:
    deque(islice(numbers, count), maxlen=0)


def _lines(number: dict[str, Iterator[int]], tables: _Tables) -> tuple[int, list[Line]]:
    """The amount, and the lines it is the sum of."""
    is_computed, kinds = tables.shapes[next(number["shape"])]
    quantities = [next(number["quantity"]) for _ in kinds]
    if is_computed:
        amounts = [
            _amount(quantity, *kind[1:]) for quantity, kind in zip(quantities, kinds, strict=True)
        ]
        total = sum(amounts)
    else:
        total = next(number["amount_nano"])
        amounts = [next(number["amount_nano"]) for _ in kinds]
    return total, [
        (dimension, quantity, price_nano, unit_scale, amount_nano, disposition)
        for (dimension, price_nano, unit_scale, disposition), quantity, amount_nano in zip(
            kinds, quantities, amounts, strict=True
        )
    ]


def _amount(quantity: int, price_nano: int, unit_scale: int, disposition: str) -> int:
    is_billed = disposition == "billed" and quantity >= 0 and unit_scale > 0
    return price_of(quantity, price_nano, unit_scale) if is_billed else 0


def _usual_id(root: bytes) -> str:
    """Of a transaction that was named by its content, as settling does it."""
    return f"lt_{root.hex()[:32]}"


def _microseconds(text: str) -> int:
    return (datetime.fromisoformat(text) - EPOCH) // MICROSECOND


def _pressed(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE)
