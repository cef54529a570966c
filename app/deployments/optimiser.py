"""Looks for faster forms of what was built: one process after the other, when no build waits.

Owns what an optimisation is given and what becomes of its result. The queue is `jobs.py`'s, the
rows `optimisation_rows.py`'s; whether the result then answers is `swaps.py`'s.
"""

import asyncio
import logging
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.broadcast import Broadcast
from app.core.database import Database
from app.core.errors import Conflict
from app.core.storage import Storage
from app.deployments import job_rows, optimisation_rows
from app.deployments.acceptance import (
    check_optimised,
    is_same_program,
    manifest_json,
    read_manifest,
    receipt_json,
)
from app.deployments.build_run import OPTIMISATION, BuildError, BuildRun
from app.deployments.job_rows import OPTIMISATIONS, ProgressWriter
from app.deployments.jobs import POLL_SECONDS, Jobs, in_time
from app.deployments.launchers.base import Launch, Launcher, Process
from app.deployments.logs import build_log_name
from app.deployments.optimisation_key import cache_key
from app.deployments.optimisation_rows import OPTIMISATIONS_TOPIC, Result
from app.deployments.service import CHANGED
from app.deployments.swaps import Serving, Swaps
from app.registry.service import version_hints
from app.registry.tables import Artifact, Model, ModelVersion, Optimisation
from app.settings import Settings
from runtime.protocol import Manifest, Optimise, Optimised

NICENESS = 15  # behind builds, which stand behind what serves
SPACE_FACTOR = 3  # every candidate writes its files before the best are kept
BUDGET_SHARE = 0.5  # of the time limit; then candidates are left out, and the rest is for proofs
CLOSE_SECONDS = 5.0
REUSED = "Reused what was measured for an earlier upload of the same file."

log = logging.getLogger(__name__)


class Optimiser(Jobs[Optimisation]):
    """Takes queued optimisations one at a time: those of versions that answer already, and those
    that somebody asked for."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        launcher: Launcher,
        broadcast: Broadcast,
        settings: Settings,
        serving: Serving,
        *,
        confirm_seconds: float = 60.0,
    ) -> None:
        super().__init__(
            database,
            storage,
            broadcast,
            rows=OPTIMISATIONS,
            errand=OPTIMISATION,
            topic=OPTIMISATIONS_TOPIC,
        )
        self._launcher = launcher
        self._settings = settings
        self._serving = serving
        self._reading: set[str] = set()  # artifacts
        self._swaps = Swaps(
            database, storage, broadcast, settings, serving, confirm_seconds=confirm_seconds
        )
        self._swapping: asyncio.Task[None] | None = None

    # --- life -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Queues again what a dead app was doing, and begins. Called after the builder's start,
        which clears up."""
        async with self._database.write() as session:
            await optimisation_rows.requeue_interrupted(session)
        self._swapping = asyncio.create_task(self._watch_swaps(), name="swaps")
        if self._settings.optimise:
            self._begin()

    async def close(self) -> None:
        """Ends a running one; it is queued again and begins anew at the next start."""
        await super().close()
        if self._swapping is not None:
            self._broadcast.publish(CHANGED)
            await asyncio.wait([self._swapping], timeout=CLOSE_SECONDS)
            self._swapping.cancel()

    async def ask(self, version_id: str) -> None:
        """Queues a version whether or not it was optimised before. Raises `Conflict`."""
        if not self._settings.optimise:
            raise Conflict(
                "The operator of this box has switched optimising off (TAPEOUT_OPTIMISE).",
                code="optimising_is_off",
            )
        async with self._database.write() as session:
            version = await session.get_one(ModelVersion, version_id)
            await optimisation_rows.enqueue(session, version, "asked")
        self._broadcast.publish(OPTIMISATIONS_TOPIC)
        self._broadcast.publish(f"version:{version_id}")

    async def cancel(self, version_id: str) -> None:
        """Takes a version off the queue or ends its optimisation; what serves is left alone.
        Raises `Conflict` if it is over."""
        async with self._database.write() as session:
            row = await optimisation_rows.require_active(session, version_id)
            message = "It was cancelled; what was built goes on serving."
            await job_rows.cancel(session, OPTIMISATIONS, row.id, message)
        self._stop(row.id)
        self._broadcast.publish(f"version:{version_id}")

    async def _watch_swaps(self) -> None:
        async for _ in self._broadcast.listen(CHANGED, POLL_SECONDS):
            if self._is_closing:
                return
            try:
                await self._swaps.look(self._reading)
            except SQLAlchemyError:
                log.exception("results that were put in force could not be watched; trying again")

    # --- one optimisation -----------------------------------------------------------------

    def _version_id(self, row: Optimisation) -> str:
        return row.version_id

    async def _claim(self, session: AsyncSession) -> Optimisation | None:
        replicas = self._serving.running()
        answering = {replica.desired.version_id for replica in replicas if replica.is_ready}
        return await optimisation_rows.claim(session, answering)

    async def _make(self, row: Optimisation, writer: ProgressWriter) -> None:
        async with self._database.read() as session:
            version = await session.get(ModelVersion, row.version_id)
            artifact_id = version.artifact_id if version else None
            artifact = await session.get(Artifact, artifact_id) if artifact_id else None
            model = await session.get(Model, version.model_id) if version else None
        if version is None or artifact is None or model is None:
            raise BuildError("version_gone", "The version is gone.")
        manifest = read_manifest(version.manifest)
        key = cache_key(model.organization_id, version, self._settings)
        if row.cause == "built" and await self._reuse(row, manifest, key):
            return
        self._storage.require_space(SPACE_FACTOR * artifact.size_bytes)
        output_dir = await self._output_dir(row)
        self._reading.add(artifact.id)
        try:
            optimised = await self._run(version, artifact.id, output_dir, writer)
        finally:
            self._reading.discard(artifact.id)
        accepts_loss = version_hints(version).accepts_loss
        check_optimised(optimised, manifest, accepts_loss)
        kept_key = key if optimisation_rows.is_repeatable(optimised.receipt) else None
        await self._adopt(row, manifest, kept_key, optimised, output_dir, writer)
        self._note(row, f"[optimised: {optimised.manifest.form} serves]")
        self._announce()

    async def _run(
        self, version: ModelVersion, artifact_id: str, output_dir: Path, writer: ProgressWriter
    ) -> Optimised:
        settings = self._settings
        artifact_dir = self._storage.artifact(artifact_id)
        launch = Launch(
            role="build",
            log_path=self._storage.log(build_log_name(version.id)),
            num_threads=settings.threads_per_worker,  # as it will be served
            device=settings.device,
            readable=(artifact_dir,),
            writable=(output_dir,),
            memory_bytes=settings.build_memory_bytes,
            niceness=NICENESS,
        )

        def message(process: Process) -> Optimise:
            return Optimise(
                artifact_dir=process.path(artifact_dir),
                output_dir=process.path(output_dir),
                device=settings.device,
                num_threads=launch.num_threads,
                memory_bytes=launch.memory_bytes,
                budget_seconds=BUDGET_SHARE * settings.optimise_timeout_seconds,
                accepts_loss=version_hints(version).accepts_loss,
            )

        run = BuildRun(
            self._launcher,
            launch,
            errand=OPTIMISATION,
            message=message,
            result=Optimised,
            timeout_seconds=settings.optimise_timeout_seconds,
            on_progress=writer.report,
        )
        return await run.run()

    async def _adopt(
        self,
        row: Optimisation,
        before: Manifest,
        key: str | None,
        optimised: Optimised,
        output_dir: Path,
        writer: ProgressWriter,
    ) -> None:
        """Where eager serves and stays the best, only the receipt is new."""
        receipt = receipt_json(optimised.receipt)
        if optimised.manifest.form == before.form == "eager":
            await self._put_in_force(row, key, Result(manifest_json(before), receipt, None))
            return

        async def record(session: AsyncSession, artifact_id: str) -> None:
            result = Result(manifest_json(optimised.manifest), receipt, artifact_id)
            await optimisation_rows.put_in_force(session, row, key, result)

        await self._keep(output_dir, writer, record)

    async def _reuse(self, row: Optimisation, before: Manifest, key: str) -> bool:
        """Whether a stored result of the same key could be put in force instead."""
        async with self._database.read() as session:
            cached = await optimisation_rows.find_cached(session, key)
        if cached is None or cached.manifest is None or cached.receipt is None:
            return False
        if not is_same_program(read_manifest(cached.manifest), before):
            return False
        if cached.artifact_id and not self._storage.artifact(cached.artifact_id).is_dir():
            return False
        result = Result(cached.manifest, cached.receipt, cached.artifact_id)
        self._swaps.reused.add(row.id)
        await self._put_in_force(row, key, result, REUSED)
        self._note(row, f"[{REUSED}]")
        self._announce()
        return True

    async def _put_in_force(
        self, row: Optimisation, key: str | None, result: Result, note: str = ""
    ) -> None:
        async def record() -> None:
            async with self._database.write() as session:
                await optimisation_rows.put_in_force(session, row, key, result, note)

        await in_time(record)

    def _announce(self) -> None:
        """The fleet brings the result to what runs, and earlier files may go."""
        self._swaps.may_have_unused = True
        self._broadcast.publish(CHANGED)
