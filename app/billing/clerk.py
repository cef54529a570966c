"""The clerk: work on the books that no request waits for, each job again and again.

Owns when jobs run and that one which fails is tried again. What a job does is its own module's.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 10.0  # with a turn that is under way when the clerk is closed

Turn = Callable[[], Awaitable[object]]


class Job(NamedTuple):
    """`turn` is done, then again after `seconds`, or at once when the job was woken."""

    name: str
    seconds: float
    turn: Turn
    wake: asyncio.Event


class Clerk:
    """One per process. Add jobs, then start it."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._is_closing = False

    def add(self, name: str, seconds: float, turn: Turn) -> None:
        self._jobs[name] = Job(name, seconds, turn, asyncio.Event())

    def wake(self, name: str) -> None:
        """Has a job's next turn begin at once. Nothing, for a job that this box does not have."""
        job = self._jobs.get(name)
        if job is not None:
            job.wake.set()

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._repeat(job), name=f"clerk: {job.name}")
            for job in self._jobs.values()
        ]

    async def close(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Lets turns that are under way end, but not for ever: what takes longer is cancelled."""
        self._is_closing = True
        for job in self._jobs.values():
            job.wake.set()
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=patience_seconds)
        for task in late:
            log.warning("%s does not end, and is cancelled", task.get_name())
            task.cancel()
        if late:
            await asyncio.wait(late)

    async def _repeat(self, job: Job) -> None:
        while not self._is_closing:
            job.wake.clear()
            try:
                await job.turn()
            except Exception:
                log.exception("%s failed; it is tried again in %d seconds", job.name, job.seconds)
            if self._is_closing:
                return
            try:
                async with asyncio.timeout(job.seconds):
                    await job.wake.wait()
            except TimeoutError:
                pass
