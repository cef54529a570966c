"""The part of the appliance that money passes through, in one process and without HTTP: prices,
journal, account writer, relay and replica links, in front of scripted workers."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from app.api.call import Call
from app.api.relay import Relay
from app.billing.accounts import AccountWriter
from app.billing.prices import PriceTable
from app.core.database import Database
from app.deployments.link import ReplicaLink
from app.metering.journal import Journal
from app.organizations.principal import Principal
from app.settings import Settings
from runtime.protocol import BuildReceipt, CandidateReport, Manifest, Serve
from tests.app.api.scripted_worker import DECODER, TENSOR, ScriptedWorker

MANIFESTS = {"tiny": DECODER, "doubler": TENSOR}
RECEIPT = BuildReceipt(
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


class Target(msgspec.Struct):
    """What a fleet resolves a model's name to."""

    endpoint_name: str
    manifest: Manifest
    link: Any
    version_number: int = 1
    version_id: str = "ver_1"
    receipt: BuildReceipt = RECEIPT


class Box:
    """One process's life. `start` recovers what the one before left."""

    def __init__(self, data_dir: Path, url: str, *, segment_bytes: int = 4_000) -> None:
        self.settings = Settings(data_dir=data_dir, database_url=url)
        self.database = Database(self.settings.async_database_url)
        self._directory = data_dir / "journal"
        self._directory.mkdir(parents=True, exist_ok=True)
        self._sockets = data_dir
        self.journal = Journal(self._directory, segment_bytes=segment_bytes)
        self.prices = PriceTable(self.database)
        self.accounts = AccountWriter(
            self.settings.sync_database_url, on_settled=self.journal.settled
        )
        self.relay = Relay(self.journal, self.prices, self.accounts, timeout_seconds=30)
        self.targets: dict[str, Target] = {}
        self._workers: list[ScriptedWorker] = []

    async def start(self) -> None:
        await self.prices.start()
        unsettled = await self.journal.start()
        await self.accounts.start(self.journal.id)
        await self.relay.recover(unsettled)

    async def connect(self) -> None:
        """Starts the workers, each at the end of a real stream."""
        for name, manifest in MANIFESTS.items():
            path = self._sockets / f"{name}.sock"
            path.unlink(missing_ok=True)  # of a process that was killed
            worker = ScriptedWorker(manifest)
            await worker.listen(path)
            link = ReplicaLink(self.journal.commit_step)
            await asyncio.get_running_loop().create_unix_connection(
                lambda link=link: link.stream, str(path)
            )
            await link.serve(Serve(artifact_dir=""), 5.0)
            self.targets[name] = Target(name, manifest, link)
            self._workers.append(worker)

    async def close(self) -> None:
        for target in self.targets.values():
            target.link.close("the box stops")
        for worker in self._workers:
            await worker.close()
        await self.relay.close()
        await self.accounts.close()
        await self.journal.close()
        await self.prices.close()
        await self.database.close()

    def call(self, organization_id: str, endpoint_name: str, key: str = "1") -> Call:
        principal = Principal(
            organization_id=organization_id,
            organization_name=organization_id,
            cache_salt=organization_id.encode(),
            is_operator=False,
            scopes=frozenset({"inference"}),
            api_key_id=f"key_{organization_id}_{key}",
            api_key_name=f"key {key}",
        )
        target: Any = self.targets[endpoint_name]
        return Call(principal=principal, target=target, route="/v1/completions", is_stream=True)
