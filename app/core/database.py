"""Database engines, sessions and column types, for SQLite and PostgreSQL alike.

Owns how transactions begin and what is durable; the tables live in each area's `tables.py`.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from sqlite3 import Connection as SqliteConnection
from typing import Any

from sqlalchemy import (
    JSON,
    DateTime,
    Dialect,
    Engine,
    MetaData,
    TypeDecorator,
    create_engine,
    event,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from app.core.failpoints import failpoint


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime. SQLite would silently drop the zone and keep the wrong instant."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "naive datetime"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# One that begins where it is entered, such as `Database.write()`.
Transaction = AbstractAsyncContextManager[AsyncSession]

Json = JSON().with_variant(JSONB(), "postgresql")


def one_of(column: str, values: tuple[str, ...]) -> str:
    """The SQL of a check constraint for an enumeration kept as text."""
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


def upsert(dialect_name: str, table: Any) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that can say what to do where the row is there: each dialect has its own."""
    return (sqlite if dialect_name == "sqlite" else postgresql).insert(table)


def is_about_a_value(error: BaseException) -> bool:
    """Whether the database refused a value that it cannot hold or compare with: text with a NUL,
    or a number beyond its column. SQLite takes the one and its driver refuses the other."""
    return isinstance(error, DataError) or (
        isinstance(error, OverflowError) and "SQLite INTEGER" in str(error)
    )


class Base(DeclarativeBase):
    """Parent of every table. Constraint names follow one convention so migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: Json, list[str]: Json}  # noqa: RUF012


class _UndoneWhenClosed(SqliteConnection):
    """A connection whose end undoes its transaction. SQLite closes one only once its last
    statement is gone: a cancelled task's is kept by its traceback, and with it the write lock."""

    def close(self) -> None:
        if self.in_transaction:
            self.rollback()
        super().close()


def _arguments(url: str) -> dict[str, Any]:
    """What SQLAlchemy's engine is made with. Its errors, which are logged, tell no values."""
    if not url.startswith("sqlite"):
        return {"pool_pre_ping": True, "hide_parameters": True}
    return {"connect_args": {"factory": _UndoneWhenClosed}, "hide_parameters": True}


def _configure_sqlite(engine: Engine) -> None:
    """WAL so that readers never wait, and full sync because money is written here."""

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not in the driver
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "busy_timeout=30000",  # writers wait their turn, on a slow disk beside a busy clerk
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Any) -> None:
        # A transaction that reads, then writes, fails when another wrote in between, unless it
        # took the write lock at its start.
        mode = connection.get_execution_options().get("sqlite_begin", "")
        connection.exec_driver_sql(f"BEGIN {mode}".strip())


class Database:
    """The asynchronous engine's two kinds of session.

    `read()` never takes the write lock. `write()` is one transaction: committed at the end of
    the block, rolled back by an exception; it must never span a network call.
    """

    def __init__(self, url: str) -> None:
        self.engine = create_async_engine(url, **_arguments(url))
        writing = self.engine
        if self.engine.dialect.name == "sqlite":
            _configure_sqlite(self.engine.sync_engine)
            writing = self.engine.execution_options(sqlite_begin="IMMEDIATE")
        self._reading = async_sessionmaker(self.engine, expire_on_commit=False)
        self._writing = async_sessionmaker(writing, expire_on_commit=False)

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[AsyncSession]:
        async with self._reading() as session:
            yield session

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncSession]:
        async with self._writing() as session:
            await _to_its_end(session.connection())
            yield session  # left by an exception, the session undoes it
            failpoint("database.before_commit")
            await _to_its_end(session.commit())
        failpoint("database.after_commit")

    async def close(self) -> None:
        await self.engine.dispose()


async def _to_its_end(work: Coroutine[Any, Any, object]) -> None:
    """Lets the beginning or the end of a transaction happen although its task is cancelled: left
    half-way in the driver's thread, it would keep SQLite's write lock until somebody notices."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def create_writer_engine(url: str) -> Engine:
    """A synchronous engine for code that owns a thread; on SQLite every transaction of it takes
    the write lock at its start."""
    engine = create_engine(url, **_arguments(url))
    if engine.dialect.name == "sqlite":
        _configure_sqlite(engine)
        return engine.execution_options(sqlite_begin="IMMEDIATE")
    return engine
