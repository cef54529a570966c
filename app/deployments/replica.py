"""One replica: a worker process kept running for a deployment, and its row.

Owns start, watch, restart with back-off and retirement. Which replicas there should be is
`reconciler.py`'s.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
from sqlalchemy import update
from sqlalchemy.exc import SQLAlchemyError

from app.core.clock import now
from app.core.database import Database
from app.core.ids import new_id
from app.core.storage import Storage
from app.deployments.desired import Desired
from app.deployments.launchers.base import Launch, Launcher, LaunchError, Process
from app.deployments.link import Commit, ReplicaLink
from app.deployments.logs import last_line, replica_log_name
from app.deployments.replica_rows import prune
from app.deployments.tables import Replica
from app.settings import Settings
from runtime.protocol import BuildReceipt, Manifest, Serve

log = logging.getLogger(__name__)


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long a replica may take, in seconds."""

    connect: float = 60.0
    start: float = 180.0  # to get ready, and another second per `load_bytes` of weights
    load_bytes: int = 50 * 1024**2
    first_back_off: float = 1.0
    max_back_off: float = 60.0
    healthy: float = 60.0  # after which earlier failures no longer count
    late_requests: float = 1.0  # for callers that chose a replica just before its retirement
    stop: float = 5.0  # between SIGTERM and SIGKILL


class Target(msgspec.Struct, frozen=True):
    """Where to send a request, and all that is needed to validate, bound and price it. The
    manifest names the form in use."""

    endpoint_name: str
    model_name: str
    version_number: int
    version_id: str
    manifest: Manifest
    receipt: BuildReceipt
    link: ReplicaLink


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """What every replica needs of its surroundings. `starts` bounds how many load at once."""

    database: Database
    storage: Storage
    launcher: Launcher
    settings: Settings
    commit: Commit
    on_change: Callable[[], None]
    keeps_serving: Callable[[str], int | None]  # deployment id -> version that answers, if any
    starts: asyncio.Semaphore
    timing: Timing


class RunningReplica:
    """Runs from its construction until `retire`. `status` is the row's."""

    def __init__(self, desired: Desired, box: Box) -> None:
        self.id = new_id("rep")
        self.desired = desired
        self.status = "starting"
        self.detail = ""
        self.memory_bytes = 0
        self.attention = ""
        self.form = ""  # in which it serves; eager where the manifest's cannot be had
        self.num_failures = 0  # since it was last well for long
        self.target: Target | None = None
        self.link: ReplicaLink | None = None
        self.has_been_ready = False
        self.has_failed = False
        self.is_retired = False
        self._box = box
        self._ready_at: float | None = None
        self._process: Process | None = None
        self._row_lock = asyncio.Lock()  # writes of the row keep their order
        self._log_path = box.storage.log(replica_log_name(self.id))
        self._task = asyncio.create_task(self._run(), name=f"replica {self.id}")
        self._task.add_done_callback(_report_crash)

    @property
    def is_ready(self) -> bool:
        return self.status == "ready" and self.link is not None and not self.link.closed

    @property
    def ready_seconds(self) -> float:
        """How long it has answered without a break."""
        if not self.is_ready or self._ready_at is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._ready_at

    async def retire(self, seconds: float, *, late_seconds: float | None = None) -> None:
        """Takes the replica off, lets its requests finish for `seconds` and ends it for good."""
        self.is_retired = True
        if self.is_ready and self.link is not None:
            await self._show("draining")
            late = self._box.timing.late_requests if late_seconds is None else late_seconds
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.link.drain(late)
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._end_process()
        await self._show("stopped", self.detail if self.has_failed else "")
        with suppress(SQLAlchemyError):  # only tidies up
            await prune(self._box.database, self._box.storage, self.desired.deployment_id)

    # --- the loop -------------------------------------------------------------------------

    async def _run(self) -> None:
        await asyncio.shield(self._insert_row())
        timing, loop = self._box.timing, asyncio.get_running_loop()
        while not self.is_retired:
            self._ready_at = None
            try:
                async with self._box.starts:
                    await self._start()
                self._ready_at = loop.time()
                await self._show("ready")
                reason = await self._watch()
            except LaunchError as error:
                reason = await self._explain(str(error))
            if self.is_retired:
                return
            if self._ready_at is not None and loop.time() - self._ready_at >= timing.healthy:
                self.num_failures = 0
            self.num_failures += 1
            self.has_failed = True
            exponent = min(self.num_failures - 1, 16)
            delay = min(timing.max_back_off, timing.first_back_off * 2**exponent)
            await self._fail(reason, delay)
            await self._end_process()
            await asyncio.sleep(delay)
            await self._show("starting", f"Start {self.num_failures + 1} after: {reason}")

    async def _start(self) -> None:
        """Raises `LaunchError`."""
        box, desired = self._box, self.desired
        settings, timing = box.settings, box.timing
        artifact_dir = box.storage.artifact(desired.artifact_id)
        launch = Launch(
            role="worker",
            log_path=self._log_path,
            num_threads=settings.threads_per_worker,
            device=settings.device,
            readable=(artifact_dir,),
        )
        self._process = process = await box.launcher.start(launch)
        self.link = link = ReplicaLink(box.commit, manifest=desired.manifest)
        await process.connect(lambda: link.stream, timing.connect)
        serving: dict[str, Any] = {
            "kv_cache_bytes": settings.kv_cache_bytes,
            "swap_bytes": settings.kv_swap_bytes,
            "poisons_blocks": settings.kv_poison,
            **desired.serving,
        }
        serve = Serve(
            artifact_dir=process.path(artifact_dir),
            device=settings.device,
            num_threads=settings.threads_per_worker,
            **serving,
        )
        load_seconds = desired.manifest.weight_bytes / timing.load_bytes
        ready = await link.serve(serve, timing.start + load_seconds)
        self.memory_bytes, self.attention = ready.memory_bytes, ready.attention
        self.form = ready.manifest.form
        self.has_been_ready = True
        self.has_failed = False
        self.target = Target(
            endpoint_name=desired.endpoint_name,
            model_name=desired.model_name,
            version_number=desired.version_number,
            version_id=desired.version_id,
            manifest=ready.manifest,
            receipt=desired.receipt,
            link=link,
        )

    async def _watch(self) -> str:
        """Returns when the worker has gone, with the reason. Either sign of it will do: the end of
        the stream, or of the process while something it started still holds the stream."""
        assert self._process is not None
        assert self.link is not None
        closed = asyncio.ensure_future(self.link.wait_closed())
        try:
            await asyncio.wait([closed, self._process.exited], return_when=asyncio.FIRST_COMPLETED)
        finally:
            closed.cancel()
        if self._process.exited.done():
            self.link.close(self._process.exited.result().explain())
        self._box.on_change()  # no request is sent there any more
        return await self._explain(f"The worker {await self.link.wait_closed()}")

    async def _explain(self, reason: str) -> str:
        """A process's own end says more than its stream's, and its last words more still."""
        process, link = self._process, self.link
        if process is None or (link is not None and link.gave_up):
            return reason
        await asyncio.wait([process.exited], timeout=0.5)
        if not process.exited.done():
            return reason
        words = await asyncio.to_thread(last_line, self._log_path)
        explained = f"The worker {process.exited.result().explain()}"
        return f"{explained}. It last said: {words}" if words else explained

    async def _end_process(self) -> None:
        self.target = None
        if self.link is not None:
            self.link.close("was stopped")
        if self._process is not None:
            await self._process.stop(self._box.timing.stop)
        self._process = None

    # --- what people see ------------------------------------------------------------------

    async def _fail(self, reason: str, delay: float) -> None:
        version = self._box.keeps_serving(self.desired.deployment_id)
        number = self.desired.version_number
        kept = ""
        if version is not None:
            kept = f" Version {version} keeps serving."
            if version == number:
                kept = " Another replica of it keeps serving."
        reason = reason.rstrip(".")
        message = f"{reason}. Version {number} starts again in {delay:.0f} s"
        log.warning("replica %s of %s: %s", self.id, self.desired.endpoint_name, reason)
        await self._show("failed", f"{message} (failure {self.num_failures}).{kept}")

    async def _insert_row(self) -> None:
        desired = self.desired
        row = Replica(
            id=self.id,
            deployment_id=desired.deployment_id,
            revision_id=desired.revision_id,
            version_id=desired.version_id,
            status="starting",
            created_at=now(),
        )
        try:
            async with self._row_lock, self._box.database.write() as session:
                session.add(row)
        except SQLAlchemyError as error:  # its deployment was deleted meanwhile
            log.warning("no row for replica %s: %s", self.id, error)
        self._box.on_change()

    async def _show(self, status: str, detail: str = "") -> None:
        self.status, self.detail = status, detail
        self._box.on_change()
        # Shielded, as everything that writes here: a retirement may cancel us at any moment.
        await asyncio.shield(self._update_row(status, detail))

    async def _update_row(self, status: str, detail: str) -> None:
        """A database that cannot be written does not keep a replica from serving."""
        values: dict[str, object] = {"status": status, "detail": detail}
        if status == "ready":
            values |= {"ready_at": now(), "memory_bytes": self.memory_bytes}
        elif status == "stopped":
            values["stopped_at"] = now()
        try:
            async with self._row_lock, self._box.database.write() as session:
                await session.execute(update(Replica).where(Replica.id == self.id).values(values))
        except SQLAlchemyError as error:
            log.warning("the row of replica %s is out of date: %s", self.id, error)


def _report_crash(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended unexpectedly", task.get_name(), exc_info=error)
