"""The clerk: work on the books that no request waits for, each job again and again.

Owns when jobs run and that one which fails is tried again. What a job does is its own module's.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

log = logging.getLogger(__name__)

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

    def add(self, name: str, seconds: float, turn: Turn) -> None:
        self._jobs[name] = Job(name, seconds, turn, asyncio.Event())

    def wake(self, name: str) -> None:
        """Has a job's next turn begin at once. Nothing, for a job that this box does not have."""
        job = self._jobs.get(name)
        if job is not None:
            job.wake.set()

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(_repeat(job), name=f"clerk: {job.name}")
            for job in self._jobs.values()
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


async def _repeat(job: Job) -> None:
    while True:
        try:
            await job.turn()
        except Exception:
            log.exception("%s failed; it is tried again in %d seconds", job.name, job.seconds)
        try:
            async with asyncio.timeout(job.seconds):
                await job.wake.wait()
        except TimeoutError:
            pass
        job.wake.clear()
