"""A small application with real accounts, journal, relay and replica link, and a scripted worker
at the other end, served by uvicorn on a free port."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import openai
import pytest
import uvicorn
from litestar import Litestar
from litestar.datastructures import State

from app.api import (
    health,
    inference_v2,
    messages,
    model_docs,
    predict,
    prices,
    receipts,
    seals,
    usage,
)
from app.api import openai as openai_routes
from app.api.arriving import ArrivingBodies
from app.api.errors import EXCEPTION_HANDLERS
from app.api.relay import Relay
from app.billing.accounts import AccountWriter
from app.billing.archiving import Archivist
from app.billing.prices import PriceTable
from app.billing.records import Records
from app.billing.sealing import Sealer
from app.billing.signing import open_key
from app.billing.usage_archive import UsageArchive
from app.core import clock
from app.core.claim import DatabaseClaim
from app.core.database import Database
from app.core.errors import NotFound
from app.core.storage import Storage
from app.deployments.link import ReplicaLink
from app.metering.journal import Journal
from app.organizations.keys import KeyRing, create_key
from app.organizations.principal import SCOPES, Principal
from app.organizations.signins import SignIns
from app.organizations.tables import Organization
from app.settings import Settings
from runtime.protocol import BuildReceipt, CandidateReport, Manifest, Serve
from tests.app.api.scripted_worker import DECODER, TENSOR, ScriptedWorker

ORGANIZATION = "org_1"
OTHER = "org_2"


class FakeTarget(msgspec.Struct):
    """What `Fleet.resolve` answers with."""

    endpoint_name: str
    manifest: Manifest
    link: Any
    version_number: int = 3
    version_id: str = "ver_1"
    receipt: BuildReceipt = BuildReceipt(
        verdict="equal",
        checks=[],
        candidates=[
            CandidateReport(
                name="eager", is_chosen=True, reason="", p50_ms={1: 1.0, 4: 2.0}, device_ms_max=2.5
            )
        ],
        phase_seconds={},
        torch_version="",
        device="cpu",
    )


class FakeFleet:
    """One replica per name, visible to everybody."""

    def __init__(self) -> None:
        self.targets: dict[str, FakeTarget] = {}

    def resolve(self, principal: Principal, model_name: str) -> FakeTarget:
        name, _, version = model_name.partition("@")
        if name not in self.targets or version not in ("", "3"):
            raise NotFound(f"The model {model_name!r} does not exist.", param="model")
        return self.targets[name]

    def visible_endpoints(self, principal: Principal) -> list[Any]:
        """Of the first organization, which has published them."""
        return [
            SimpleNamespace(
                name=name,
                is_ready=not target.link.closed,
                desired=SimpleNamespace(
                    deployment_id=name, organization_id=ORGANIZATION, version_number=3
                ),
            )
            for name, target in self.targets.items()
        ]

    def live(self, deployment_id: str) -> list[Any]:
        return [SimpleNamespace(stats=self.targets[deployment_id].link.stats)]


class Box:
    """The application under test and the doors to it."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.settings = settings
        self.database = database
        self.storage = Storage(settings.data_dir)
        self.fleet = FakeFleet()
        self.workers: dict[str, ScriptedWorker] = {}
        self.keys: dict[str, str] = {}
        self.timeout_seconds = 30.0
        self.url = ""

    async def start(self) -> None:
        self.claim = DatabaseClaim(self.settings.sync_database_url)
        self.claim.take()
        self.journal = Journal(self.storage.journal_dir)
        unsettled = await self.journal.start()
        self.prices = PriceTable(self.database)
        await self.prices.start()
        self.accounts = AccountWriter(
            self.settings.sync_database_url, on_settled=self.journal.settled
        )
        await self.accounts.start(self.journal.id)
        self.relay = Relay(
            self.journal, self.prices, self.accounts, timeout_seconds=self.timeout_seconds
        )
        await self.relay.recover(unsettled)
        key = open_key(self.storage.receipt_key)
        archive = UsageArchive(self.storage.usage_archive)
        url = self.settings.sync_database_url
        self.sealer = Sealer(url, key)
        self.archivist = Archivist(url, archive, self.settings.usage_detail_days, self.journal.sync)
        self.records = Records(url, archive, key.public_hex)
        self.key_ring = KeyRing(self.database)
        await self._add_keys()
        await self.connect("tiny", DECODER)
        await self.connect("doubler", TENSOR)
        await self._serve()

    async def _add_keys(self) -> None:
        async with self.database.write() as session:
            for organization_id in (ORGANIZATION, OTHER):
                if await session.get(Organization, organization_id) is not None:
                    return
                session.add(
                    Organization(
                        id=organization_id,
                        name=organization_id,
                        cache_salt=organization_id.encode(),
                        is_operator=organization_id == ORGANIZATION,
                        created_at=clock.now(),
                    )
                )
                await session.flush()
                _, self.keys[organization_id] = await create_key(
                    session, organization_id, "all", SCOPES
                )
            _, self.keys["read"] = await create_key(
                session, ORGANIZATION, "read", frozenset({"read"})
            )

    async def connect(self, name: str, manifest: Manifest) -> None:
        path = self.storage.run_dir / f"{name}.sock"
        worker = self.workers[name] = ScriptedWorker(manifest)
        await worker.listen(path)
        link = ReplicaLink(self.journal.commit_step)
        await asyncio.get_running_loop().create_unix_connection(lambda: link.stream, str(path))
        await link.serve(Serve(artifact_dir=""), 5.0)
        self.fleet.targets[name] = FakeTarget(name, manifest, link)

    async def _serve(self) -> None:
        self.app = app = Litestar(
            [
                health.router,
                openai_routes.router,
                messages.router,
                predict.router,
                inference_v2.router,
                model_docs.router,
                receipts.router,
                seals.router,
                usage.router,
                prices.router,
            ],
            state=State(
                {
                    "settings": self.settings,
                    "database": self.database,
                    "key_ring": self.key_ring,
                    "arriving": ArrivingBodies(self.settings.max_request_bytes),
                    "fleet": self.fleet,
                    "journal": self.journal,
                    "prices": self.prices,
                    "accounts": self.accounts,
                    "relay": self.relay,
                    "records": self.records,
                    "claim": self.claim,
                    "sign_ins": SignIns(self.database, session_days=1),
                }
            ),
            exception_handlers=EXCEPTION_HANDLERS,
            openapi_config=None,
        )
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_config=None, lifespan="off", access_log=False)
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server._serve([listener]))
        while not self._server.started:  # noqa: ASYNC110 - uvicorn offers no event
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self._server.should_exit = True
        await self._serving
        await self.crash_replicas()
        await self.relay.close()
        for part in (self.sealer, self.archivist, self.records):
            await part.close()
        await self.accounts.close()
        await self.journal.close()
        await self.prices.close()
        await self.key_ring.close()
        self.claim.release()

    async def crash_replicas(self) -> None:
        for name, worker in self.workers.items():
            link = self.fleet.targets[name].link
            if not link.closed:
                link.close("stopped by the test")
            await worker.close()

    def client(self, key: str = ORGANIZATION, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=self.keys[key], max_retries=0, **options
        )

    def http(self, key: str = ORGANIZATION) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {self.keys[key]}"}
        )

    async def receipt(self, request_id: str, key: str = ORGANIZATION) -> dict[str, Any]:
        async with self.http(key) as http:
            response = await http.get(f"/v1/receipts/{request_id}")
        assert response.status_code == 200, response.text
        return response.json()


@pytest.fixture
async def box(settings: Settings, database: Database, tmp_path: Path) -> AsyncIterator[Box]:
    box = Box(settings, database)
    await box.start()
    yield box
    with contextlib.suppress(AttributeError):
        await box.stop()


@pytest.fixture
async def client(box: Box) -> AsyncIterator[openai.AsyncOpenAI]:
    async with box.client() as client:
        yield client
