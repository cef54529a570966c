"""The few expressions that SQLite and PostgreSQL spell differently, and the snapshot that all
checks of one run read."""

from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine

from app.core.database import create_writer_engine


def reading_engine(url: str) -> Engine:
    """For whole runs on a thread: its transactions see one moment of the database, take no lock
    that a writer waits for, and write nothing."""
    engine = create_writer_engine(url)
    if engine.dialect.name == "sqlite":
        return engine.execution_options(sqlite_begin="DEFERRED")
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


@contextmanager
def snapshot(engine: Engine) -> Generator[Connection]:
    """One transaction, which sees the database as it is at its first query."""
    with engine.connect() as connection, connection.begin():
        yield connection


def month_of(connection: Connection, column: str) -> str:
    """`YYYY-MM` (UTC) of an instant's column."""
    if connection.dialect.name == "sqlite":
        return f"substr({column}, 1, 7)"
    return f"to_char(timezone('UTC', {column}), 'YYYY-MM')"


def month_of_hour(connection: Connection, column: str) -> str:
    """`YYYY-MM` (UTC) of a column of hours since 1970."""
    if connection.dialect.name == "sqlite":
        return f"strftime('%Y-%m', {column} * 3600, 'unixepoch')"
    return f"to_char(timezone('UTC', to_timestamp({column}::bigint * 3600)), 'YYYY-MM')"


def join_in_order(connection: Connection) -> str:
    """A join whose left side is read first: SQLite, which keeps no statistics, would rather read
    a large table from end to end than look up in it what few rows on the left name."""
    return "CROSS JOIN" if connection.dialect.name == "sqlite" else "JOIN"
