"""Brings what runs in line with what should: starts, moves on and retires replicas.

Owns the running replicas of all deployments. Who may call what is `fleet.py`'s.
"""

import asyncio

from app.core.database import Database
from app.deployments.desired import Desired, DesiredReader, plan
from app.deployments.replica import Box, RunningReplica
from app.deployments.replica_rows import mark_interrupted


class Reconciler:
    """`desired` is what the last look at the database said."""

    def __init__(self, database: Database, box: Box) -> None:
        self.desired: dict[str, Desired] = {}
        self._database = database
        self._box = box
        self._reader = DesiredReader()
        self._replicas: dict[str, list[RunningReplica]] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def replicas(self, deployment_id: str) -> list[RunningReplica]:
        """Oldest first, retiring ones included."""
        return list(self._replicas.get(deployment_id, ()))

    def all_replicas(self) -> list[RunningReplica]:
        """Of all deployments, retiring ones included."""
        return [replica for running in self._replicas.values() for replica in running]

    async def begin(self) -> None:
        """Called once, before the first `reconcile`."""
        async with self._database.write() as session:
            await mark_interrupted(session)

    async def reconcile(self) -> None:
        """One look, and everything that follows from it. Nothing in it waits for a process."""
        async with self._database.read() as session:
            self.desired = await self._reader.read(session)
        for deployment_id in {*self.desired, *self._replicas}:
            desired = self.desired.get(deployment_id)
            running = self._replicas.setdefault(deployment_id, [])
            todo = plan(desired, running)
            for replica in todo.to_retire:
                # Who deleted a model does not wait for its requests as long as who replaces one.
                settings = self._box.settings
                seconds = settings.request_timeout_seconds if desired else settings.drain_seconds
                self._retire(replica, seconds)
            if desired is not None:
                running += [RunningReplica(desired, self._box) for _ in range(todo.num_to_start)]
            if not running:
                del self._replicas[deployment_id]

    async def close(self, drain_seconds: float) -> None:
        """Retires everything at once. The longest that takes is `drain_seconds` and the time that
        ending processes takes."""
        for running in self._replicas.values():
            for replica in running:
                if not replica.is_retired:
                    self._retire(replica, drain_seconds, late_seconds=0.0)
        if self._retiring:
            limit = drain_seconds + 3 * self._box.timing.stop
            _, late = await asyncio.wait(self._retiring, timeout=limit)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _retire(
        self, replica: RunningReplica, seconds: float, late_seconds: float | None = None
    ) -> None:
        replica.is_retired = True
        task = asyncio.create_task(self._retired(replica, seconds, late_seconds))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retired(
        self, replica: RunningReplica, seconds: float, late_seconds: float | None
    ) -> None:
        try:
            await replica.retire(seconds, late_seconds=late_seconds)
        finally:
            deployment_id = replica.desired.deployment_id
            rest = [other for other in self.replicas(deployment_id) if other is not replica]
            self._replicas[deployment_id] = rest
            self._box.on_change()
