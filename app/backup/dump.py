"""The database as files: every table's rows at one moment, the same for SQLite and PostgreSQL.

Owns the form of a table's file: compressed MessagePack, one list of columns, then rows. Such a file
can be read into the other kind of database as well.
"""

import hashlib
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
from sqlalchemy import Connection, Engine, Table, func, insert, select, text

import app.billing.payments.tables
import app.billing.tables
import app.deployments.tables
import app.metering.tables
import app.organizations.tables
import app.registry.tables
from app.core.database import Base

# What defines tables: all of them are known once these are imported.
TABLE_MODULES = (
    app.billing.payments.tables,
    app.billing.tables,
    app.deployments.tables,
    app.metering.tables,
    app.organizations.tables,
    app.registry.tables,
)
ROWS_AT_ONCE = 2_000
NO_COLUMNS: list[str] = []
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()


class DumpError(Exception):
    """A file that is not what was dumped. The message says which, in plain words."""


class Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


class TableFile(msgspec.Struct, frozen=True):
    """What one table's file holds."""

    num_rows: int
    sha256: str


def tables() -> list[Table]:
    """In an order in which rows can be inserted."""
    return Base.metadata.sorted_tables


@contextmanager
def snapshot(engine: Engine) -> Generator[Connection]:
    """A connection that sees the database as it is now, whatever is written meanwhile."""
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")  # the moment
        else:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield connection


def revision_of(connection: Connection) -> str:
    """Of the schema."""
    return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


def dump_table(connection: Connection, table: Table, path: Path) -> TableFile:
    """Writes every row of the snapshot."""
    num_rows, digest, compressor = 0, hashlib.sha256(), zlib.compressobj(6)
    rows = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(
        select(table).order_by(*table.primary_key.columns)
    )
    with path.open("xb") as file:

        def write(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        write(compressor.compress(_framed([column.name for column in table.columns])))
        for row in rows:
            write(compressor.compress(_framed(list(row))))
            num_rows += 1
        write(compressor.flush())
    return TableFile(num_rows, digest.hexdigest())


def load_table(connection: Connection, table: Table, path: Path, expected: TableFile) -> None:
    """Inserts every row. Raises `DumpError` where the file is not the one that was written; the
    transaction is the caller's to undo then."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        records = _records(file, digest)
        columns: list[str] = next(records, NO_COLUMNS)
        num_rows = 0
        while batch := list(islice(records, ROWS_AT_ONCE)):
            connection.execute(
                insert(table), [dict(zip(columns, row, strict=True)) for row in batch]
            )
            num_rows += len(batch)
    if (num_rows, digest.hexdigest()) != (expected.num_rows, expected.sha256):
        raise DumpError(f"{path.name} is damaged: its rows are not those that were written.")


def is_empty(connection: Connection) -> bool:
    """Whether no table has a row."""
    return not any(connection.scalar(select(func.count()).select_from(t)) for t in tables())


def _framed(value: Any) -> bytes:
    data = _encoder.encode(value)
    return len(data).to_bytes(4, "big") + data


def _records(file: BinaryIO, digest: Digest) -> Iterator[Any]:
    decompressor, buffer = zlib.decompressobj(), bytearray()
    try:
        while data := file.read(1024 * 1024):
            digest.update(data)
            buffer += decompressor.decompress(data)
            yield from _taken(buffer)
        buffer += decompressor.flush()
        yield from _taken(buffer)
    except (zlib.error, msgspec.DecodeError) as error:
        raise DumpError(f"{Path(file.name).name} is damaged: {error}.") from error
    if buffer or not decompressor.eof:
        raise DumpError(f"{Path(file.name).name} is cut short.")


def _taken(buffer: bytearray) -> Iterator[Any]:
    """Whole records from the front of the buffer, which loses them."""
    at = 0
    while len(buffer) - at >= 4:
        end = at + 4 + int.from_bytes(buffer[at : at + 4], "big")
        if len(buffer) < end:
            break
        yield _decoder.decode(buffer[at + 4 : end])
        at = end
    del buffer[:at]
