"""What becomes of an optimisation's result once it is in force: whether its replica answers.

Looks at the fleet. A result that answers for long enough loses its way back; one that does not
start is taken back; one that this box cannot serve any more, because its environment changed, has
its version optimised again. Artifacts that nothing names and no replica uses are removed.
"""

import asyncio
import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Protocol

from sqlalchemy import select

from app.core.broadcast import Broadcast
from app.core.clock import now
from app.core.database import Database
from app.core.errors import Conflict
from app.core.storage import Storage
from app.deployments import artifacts, optimisation_rows
from app.deployments.desired import Desired
from app.deployments.logs import LogFile, build_log_name
from app.deployments.optimisation_rows import OPTIMISATIONS_TOPIC
from app.deployments.service import CHANGED
from app.registry.tables import ModelVersion, Optimisation
from app.settings import Settings

MAX_FAILURES = 2  # starts of a result's replica, before it is taken back
FOREIGN = "A worker serves eager instead, because the form does not hold there; its log says why."

log = logging.getLogger(__name__)


class Running(Protocol):
    """A replica, as far as it tells whether what it was given answers."""

    @property
    def desired(self) -> Desired: ...
    @property
    def is_ready(self) -> bool: ...
    @property
    def ready_seconds(self) -> float: ...
    @property
    def form(self) -> str: ...
    @property
    def num_failures(self) -> int: ...
    @property
    def detail(self) -> str: ...


class Serving(Protocol):
    """The fleet, as far as it is looked at here."""

    def running(self) -> Sequence[Running]: ...


class Swaps:
    """`reused` are optimisations that took over a stored result in this app's life.
    `may_have_unused` says that an artifact may have lost its last user."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        broadcast: Broadcast,
        settings: Settings,
        serving: Serving,
        *,
        confirm_seconds: float,
    ) -> None:
        self.reused: set[str] = set()
        self.may_have_unused = True
        self._database = database
        self._storage = storage
        self._broadcast = broadcast
        self._settings = settings
        self._serving = serving
        self._confirm_seconds = confirm_seconds
        self._began_at = now()
        # (version, artifact) whose form does not hold here. Versions may share an artifact.
        self._known_foreign: set[tuple[str, str]] = set()

    async def look(self, in_use: Collection[str]) -> None:
        """One look at all replicas; artifacts `in use` by others are kept."""
        replicas = self._serving.running()
        async with self._database.read() as session:
            unconfirmed = await optimisation_rows.unconfirmed(session)
        for row in unconfirmed:
            await self._judge(row, replicas)
        for replica in replicas:
            if replica.is_ready and replica.form != replica.desired.manifest.form:
                await self._replace_foreign(replica.desired)
        if self.may_have_unused:
            used = {replica.desired.artifact_id for replica in replicas}
            await self._remove_unused(used.union(in_use))

    async def _judge(self, row: Optimisation, replicas: Sequence[Running]) -> None:
        mine = [
            replica
            for replica in replicas
            if replica.desired.version_id == row.version_id
            and replica.desired.artifact_id == row.artifact_id
        ]
        form = (row.manifest or {}).get("form")
        long_ready = [each for each in mine if each.ready_seconds > self._confirm_seconds]
        if any(replica.form == form for replica in long_ready):
            async with self._database.write() as session:
                await optimisation_rows.confirm(session, row.id)
            self.may_have_unused = True
            return
        failing = [replica for replica in mine if replica.num_failures >= MAX_FAILURES]
        if failing:
            await self._take_back(row, failing[0].detail)

    async def _take_back(self, row: Optimisation, reason: str) -> None:
        async with self._database.write() as session:
            if not await optimisation_rows.fall_back(session, row.id, reason):
                return
        log.warning("the optimised form of version %s was taken back: %s", row.version_id, reason)
        self._note(row.version_id, f"[taken back: {reason}]")
        self.may_have_unused = True
        self._broadcast.publish(CHANGED)
        self._broadcast.publish(f"version:{row.version_id}")

    async def _replace_foreign(self, desired: Desired) -> None:
        """Its worker serves eager, because the form that was chosen does not hold there. Once for
        each version and artifact. A form that was made since this app began is taken back: looking
        again would find the same. For any other, the box has changed."""
        mark = (desired.version_id, desired.artifact_id)
        if mark in self._known_foreign:
            return
        async with self._database.write() as session:
            await optimisation_rows.distrust(session, desired.artifact_id)
            made = await session.scalar(
                select(Optimisation).where(
                    Optimisation.version_id == desired.version_id,
                    Optimisation.artifact_id == desired.artifact_id,
                )
            )
        log.warning(
            "version %s serves eager: its form %s does not hold here",
            desired.version_id,
            desired.manifest.form,
        )
        if made is not None and self._is_fresh(made):
            await self._take_back(made, FOREIGN)
        elif self._settings.optimise:
            await self._queue_again(desired.version_id)
        self._known_foreign.add(mark)  # now that it is written; else the next look tries again

    def _is_fresh(self, row: Optimisation) -> bool:
        has_run = row.id not in self.reused
        return has_run and row.finished_at is not None and row.finished_at > self._began_at

    async def _queue_again(self, version_id: str) -> None:
        async with self._database.write() as session:
            version = await session.get(ModelVersion, version_id)
            if version is not None:
                with suppress(Conflict):  # it is queued already
                    await optimisation_rows.enqueue(session, version, "environment")
        self._broadcast.publish(OPTIMISATIONS_TOPIC)
        self._broadcast.publish(f"version:{version_id}")

    async def _remove_unused(self, in_use: Collection[str]) -> None:
        self.may_have_unused = False
        async with self._database.write() as session:
            removed, num_left = await optimisation_rows.remove_unused_rows(session, in_use)
        for artifact_id in removed:
            await asyncio.to_thread(artifacts.remove, self._storage.artifact(artifact_id))
        self.may_have_unused = num_left > 0

    def _note(self, version_id: str, text: str) -> None:
        log_file = LogFile(self._storage.log(build_log_name(version_id)))
        log_file.note(text)
        log_file.close()
