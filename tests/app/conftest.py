"""A migrated database per test: a copied SQLite file, or, with TEST_DATABASE_URL set to a
PostgreSQL URL whose user may create databases, a database made from a template."""

import asyncio
import os
import shutil
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection, NullPool, create_engine, make_url, text

from app.core.database import Database, create_writer_engine
from app.core.migration import upgrade
from app.settings import Settings
from tests.stripe_stand_in.fixtures import stripe_client, stripe_stand_in  # noqa: F401

ADMIN_KEY = "tp-test-admin-key-0123456789"


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what has a database of its own, which is what may differ from one server to another."""
    for item in items:
        if isinstance(item, pytest.Function) and "database_url" in item.fixturenames:
            item.add_marker("database")


@pytest.fixture(scope="session")
def template_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a migrated, empty database that tests copy."""
    server = os.environ.get("TEST_DATABASE_URL")
    if not server:
        path = tmp_path_factory.mktemp("database") / "template.db"
        engine = create_writer_engine(f"sqlite:///{path}")
        upgrade(engine)
        engine.dispose()
        yield f"sqlite:///{path}"
        return
    name = f"template_{uuid.uuid4().hex[:12]}"
    with _server_connection(server) as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = make_url(server).set(drivername="postgresql+psycopg", database=name)
    engine = create_engine(url)
    upgrade(engine)
    engine.dispose()
    yield url.render_as_string(hide_password=False)
    with _server_connection(server) as connection:
        connection.execute(text(f"DROP DATABASE {name}"))


@pytest.fixture
def database_url(template_database: str, tmp_path: Path) -> Iterator[str]:
    """A database of this test's own."""
    template = make_url(template_database)
    if template.drivername == "sqlite":
        path = tmp_path / "tapeout.db"
        shutil.copy(str(template.database), path)
        yield f"sqlite:///{path}"
        return
    name = f"test_{uuid.uuid4().hex[:12]}"
    server = os.environ["TEST_DATABASE_URL"]
    with _server_connection(server) as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template.database}"))
    yield template.set(database=name).render_as_string(hide_password=False)
    with _server_connection(server) as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def _server_connection(url: str) -> Connection:
    url = make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    return engine.connect()


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Settings of a box whose data lies in the test's own directory. Faster forms are looked for
    only where a test asks for it."""
    return Settings(
        data_dir=tmp_path / "data",
        database_url=database_url,
        admin_key=ADMIN_KEY,
        worker_threads=1,
        build_threads=1,
        optimise=False,
        kv_cache_bytes=32 * 1024**2,
    )


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    """The asynchronous database of the control plane."""
    database = Database(settings.async_database_url)
    yield database
    await database.close()


@pytest.fixture
async def no_threads() -> AsyncIterator[None]:
    """Every thread that is anybody's is busy, as it is with large files."""
    may_end = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        threads.submit(may_end.wait)
        yield
        may_end.set()
