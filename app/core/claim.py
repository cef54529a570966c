"""One app per database: a claim that ends with the process, however it ends.

On SQLite the lock of a file beside the database, on PostgreSQL an advisory lock of a session of
its own. Owns no tables and no schema.
"""

import os
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

from sqlalchemy import Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from app.core.errors import Conflict, Unavailable
from app.core.lock import FileInUse, hold_file

LOCK_KEY = int.from_bytes(b"tapeout", "big")  # of PostgreSQL's locks, which each database has
MAX_NAME_LENGTH = 63  # of a PostgreSQL session's name
CONNECT_SECONDS = 10

_HOLDER = text(
    "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid)"
    " WHERE locktype = 'advisory' AND granted AND classid = :high AND objid = :low"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


class DatabaseInUse(Conflict):
    """Another process runs on this database."""

    default_code = "database_in_use"


class DatabaseClaim:
    """Keeps every other app off a database, from `take` to `release`. Every method blocks."""

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        arguments: dict[str, str | int] = {} if self._is_sqlite else _session_arguments()
        self._engine = create_engine(
            self._url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=arguments
        )
        self._stack = ExitStack()  # the lock file, or the session's connection
        self._connection: Connection | None = None  # of PostgreSQL
        self._turn = threading.Lock()  # a connection serves one thread at a time
        self._is_released = False
        self.is_held = False

    def take(self) -> None:
        """Raises `DatabaseInUse` when another app has it, `Unavailable` when there is no
        database; at once, never waits for the other's end."""
        with self._turn:
            self._take()

    def renew(self) -> None:
        """Takes the database again if the connection was lost, and the lock with it. Raises as
        `take`."""
        with self._turn:
            if self._is_released or self._is_sqlite:
                return
            if self._connection is not None and not _answers(self._connection):
                self.is_held = False
                self._let_go()
            if self._connection is None:
                self._take()

    def release(self) -> None:
        with self._turn:
            self._is_released, self.is_held = True, False
            self._let_go()

    def _take(self) -> None:
        try:
            if self._is_sqlite:
                self._lock_file()
            else:
                self._lock_session()
        except (SQLAlchemyError, OSError) as error:
            self._let_go()
            raise Unavailable(
                f"{self._name()} cannot be used: {_reason(error)}. "
                "Check TAPEOUT_DATABASE_URL, and that the database is there.",
                code="database_unavailable",
            ) from error
        except DatabaseInUse:
            self._let_go()
            raise
        self.is_held = True

    def _lock_file(self) -> None:
        with self._engine.connect() as connection:  # SQLite itself knows which file a URL means
            path = connection.exec_driver_sql("PRAGMA database_list").one()[2]
        if not path:
            return  # in memory, so nobody else's
        try:
            self._stack.enter_context(hold_file(Path(f"{path}.lock")))
        except FileInUse as holder:
            raise self._in_use(str(holder)) from holder

    def _lock_session(self) -> None:
        self._connection = connection = self._stack.enter_context(self._engine.connect())
        is_taken = connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK_KEY})
        if not is_taken:
            key = {"high": LOCK_KEY >> 32, "low": LOCK_KEY & 0xFFFFFFFF}
            holder = connection.scalar(_HOLDER, key)
            raise self._in_use(f" ({holder.removeprefix('tapeout ')})" if holder else "")

    def _let_go(self) -> None:
        self._connection = None
        self._stack.close()

    def _in_use(self, holder: str) -> DatabaseInUse:
        return DatabaseInUse(
            f"{self._name()} is in use by another Tapeout{holder}. Stop that one first, or give "
            "this one a database of its own with TAPEOUT_DATABASE_URL."
        )

    def _name(self) -> str:
        place = f" on {self._url.host}" if self._url.host else ""
        return f"The database {self._url.database}{place}"


def _session_arguments() -> dict[str, str | int]:
    """The session's name says to the next one who has the database."""
    name = f"tapeout process {os.getpid()} on {socket.gethostname()}"
    return {"application_name": name[:MAX_NAME_LENGTH], "connect_timeout": CONNECT_SECONDS}


def _answers(connection: Connection) -> bool:
    try:
        connection.execute(text("SELECT 1"))
    except SQLAlchemyError:
        return False
    return True


def _reason(error: SQLAlchemyError | OSError) -> str:
    """The first line of what the database's driver or the system said."""
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0].rstrip(".")
