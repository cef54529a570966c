"""The database's triggers while a restore puts back what they let nobody add.

They refuse entries of a transaction that is sealed, and a sealed one that waits for its seal: both
are what a box with a past consists of. Owns nothing of what they say; that is the schema's.
"""

from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy import Connection, text

from app.backup.dump import tables


@contextmanager
def without_triggers(connection: Connection) -> Generator[None]:
    """Switches them off within the connection's transaction. If that fails, it is the caller's to
    undo, which brings them back as well."""
    if connection.dialect.name == "sqlite":
        made = connection.execute(
            text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' ORDER BY rowid")
        ).all()
        for name, _ in made:
            connection.exec_driver_sql(f'DROP TRIGGER "{name}"')
        yield
        for _, sql in made:
            connection.exec_driver_sql(sql)
        return
    for table in tables():  # foreign keys are held: their triggers are the system's
        connection.exec_driver_sql(f'ALTER TABLE "{table.name}" DISABLE TRIGGER USER')
    yield
    for table in tables():
        connection.exec_driver_sql(f'ALTER TABLE "{table.name}" ENABLE TRIGGER USER')
