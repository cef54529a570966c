"""The management API on a real database and disk, with stand-ins for what runs models."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from litestar import Litestar
from litestar.datastructures import State

from app.api import (
    deployments,
    documentation,
    keys,
    models,
    optimisations,
    organization,
    uploads,
)
from app.api.arriving import ArrivingBodies
from app.api.errors import EXCEPTION_HANDLERS
from app.core.broadcast import Broadcast
from app.core.database import Database
from app.core.errors import Unavailable
from app.core.storage import Storage
from app.deployments import optimisation_rows
from app.organizations.keys import KeyRing
from app.organizations.principal import Principal
from app.organizations.service import bootstrap, create_organization
from app.registry.tables import ModelVersion
from app.registry.uploads import UploadStore
from app.settings import Settings
from runtime.protocol import Manifest
from tests.app.api.management.callers import Caller, make_caller
from tests.app.api.management.serving import Serving, make_serving
from tests.app.conftest import ADMIN_KEY
from tests.app.deployments.fake_process import TENSOR
from tests.app.registry.archive_files import write_pt2


class FakeTarget(msgspec.Struct, frozen=True):
    manifest: Manifest


class FakeFleet:
    """Serves what tests put into `serving`, as `name@number`."""

    def __init__(self) -> None:
        self.serving: set[str] = set()

    def resolve(self, principal: Principal, model_name: str) -> FakeTarget:
        if model_name not in self.serving:
            raise Unavailable("No replica answers yet.")
        return FakeTarget(TENSOR)


class FakeBuilder:
    """Cancels at once."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def cancel(self, version_id: str) -> None:
        async with self._database.write() as session:
            version = await session.get_one(ModelVersion, version_id)
            version.status = "cancelled"


class FakeOptimiser:
    """Takes what it is told into the rows, and looks for nothing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ask(self, version_id: str) -> None:
        async with self._database.write() as session:
            version = await session.get_one(ModelVersion, version_id)
            await optimisation_rows.enqueue(session, version, "asked")

    async def cancel(self, version_id: str) -> None:
        async with self._database.write() as session:
            row = await optimisation_rows.require_active(session, version_id)
            row.status = "cancelled"


@pytest.fixture
async def app(database: Database, settings: Settings) -> AsyncIterator[Litestar]:
    await bootstrap(database, settings)
    storage = Storage(settings.data_dir)
    key_ring = KeyRing(database)
    state: dict[str, Any] = {
        "settings": settings,
        "database": database,
        "storage": storage,
        "broadcast": Broadcast(),
        "key_ring": key_ring,
        "arriving": ArrivingBodies(settings.max_request_bytes),
        "uploads": UploadStore(database, storage, settings),
        "fleet": FakeFleet(),
        "builder": FakeBuilder(database),
        "optimiser": FakeOptimiser(database),
    }
    yield Litestar(
        route_handlers=[
            keys.router,
            organization.router,
            uploads.router,
            models.router,
            optimisations.router,
            deployments.router,
            documentation.router,
        ],
        exception_handlers=EXCEPTION_HANDLERS,  # type: ignore[arg-type]
        state=State(state),
        openapi_config=documentation.OPENAPI_CONFIG,
        request_max_body_size=settings.max_request_bytes,
        logging_config=None,
    )
    await key_ring.close()


@pytest.fixture
async def client(app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    """Calls the application in the test's own event loop, which the database needs."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://box") as client:
        yield client


@pytest.fixture
async def caller(database: Database, app: Litestar) -> Caller:
    """Of an ordinary organization, with every scope."""
    async with database.write() as session:
        organization = await create_organization(session, "acme")
    return await make_caller(database, organization.id)


@pytest.fixture
async def stranger(database: Database, app: Litestar) -> Caller:
    """Of another ordinary organization, with every scope."""
    async with database.write() as session:
        organization = await create_organization(session, "other")
    return await make_caller(database, organization.id)


@pytest.fixture
def operator() -> dict[str, str]:
    """Headers of the box's operator."""
    return {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture
def program(tmp_path: Path) -> bytes:
    """A small sound upload."""
    return write_pt2(tmp_path / "program.pt2").read_bytes()


@pytest.fixture
async def serving(app: Litestar, database: Database, caller: Caller, program: bytes) -> Serving:
    """The caller's model `digits`, which serves."""
    principal = await app.state.key_ring.authenticate(caller.secret)
    return await make_serving(database, app.state.uploads, caller, principal, program)


@pytest.fixture
async def server(app: Litestar) -> AsyncIterator[str]:
    """The application under uvicorn, in this event loop; gives host and port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        host, port = listener.getsockname()
        yield f"{host}:{port}"
        server.should_exit = True
        await task
