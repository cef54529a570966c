"""How SQLite would find what a statement asks for, which a test's few rows do not show."""

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event

from app.core.database import Database

Plans = Callable[[str], Awaitable[list[str]]]


@contextmanager
def sqlite_plans(database: Database) -> Generator[Plans]:
    """Gives the plans of the statements within that name a table, in their order. Skips the test
    on PostgreSQL, which plans by what is in the tables."""
    engine = database.engine
    if engine.dialect.name != "sqlite":
        pytest.skip("a plan of SQLite's")
    seen: list[tuple[str, Any]] = []

    def on_execute(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        seen.append((statement, parameters))

    async def plans(table: str) -> list[str]:
        async with engine.connect() as connection:
            found: list[str] = []
            for statement, parameters in [each for each in seen if f"FROM {table}" in each[0]]:
                rows = await connection.exec_driver_sql(
                    f"EXPLAIN QUERY PLAN {statement}", parameters
                )
                found.append("\n".join(row["detail"] for row in rows.mappings()))
            return found

    event.listen(engine.sync_engine, "before_cursor_execute", on_execute)
    try:
        yield plans
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", on_execute)
