"""What a worker sent and the journal does not hold yet.

Owns the order in which outputs become durable and are handed out, and how far a worker may get
ahead of the disk. What a worker may claim was checked before, by `link.py`.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable

from app.core.errors import AppError
from app.deployments.claims import failure_of
from app.deployments.generation import Generation
from app.deployments.metered import Metered
from app.deployments.outstanding import Outstanding
from app.deployments.stream import FrameStream
from runtime.protocol import Cancel, Failed, FromWorker, SequenceOutput, Step

MAX_UNDELIVERED = 64  # frames that wait for the journal before the worker has to wait too

Commit = Callable[[list[SequenceOutput]], Awaitable[None]]
ByRequest = dict[str, list[SequenceOutput]]


class Delivery:
    """One worker's steps and late failures, in the order they came.

    Steps that wait together are committed together, so that a worker faster than the disk does
    not wait for it once per step; each is still handed out by itself. A step after a failure
    waits for it.
    """

    def __init__(
        self,
        commit: Commit,
        outstanding: Outstanding,
        stream: FrameStream[FromWorker],
        metered: Metered,
    ) -> None:
        self._commit = commit
        self._outstanding = outstanding
        self._stream = stream
        self._metered = metered
        self._queue: asyncio.Queue[Step | Failed | None] = asyncio.Queue()

    @property
    def num_waiting(self) -> int:
        """Messages queued, without those being written."""
        return self._queue.qsize()

    def add(self, message: Step | Failed) -> None:
        self._queue.put_nowait(message)
        if self.num_waiting >= MAX_UNDELIVERED:
            self._stream.pause_reading()

    def end(self) -> None:
        """Nothing will be added: `run` returns once everything has been handed out."""
        self._queue.put_nowait(None)

    async def run(self) -> None:
        """Hands out what is added until `end`."""
        while True:
            messages = await self._take()
            for is_step, group in itertools.groupby(messages, lambda m: isinstance(m, Step)):
                if is_step:
                    await self._deliver([step for step in group if isinstance(step, Step)])
                    continue
                for message in group:
                    if not isinstance(message, Failed):
                        return
                    self._outstanding.fail(message.request_id, failure_of(message.error))
            if self.num_waiting <= MAX_UNDELIVERED // 2:
                self._stream.resume_reading()

    async def _take(self) -> list[Step | Failed | None]:
        """Waits for a message and takes what is queued behind it, within the bound."""
        messages = [await self._queue.get()]
        while len(messages) < MAX_UNDELIVERED and not self._queue.empty():
            messages.append(self._queue.get_nowait())
        return messages

    async def _deliver(self, steps: list[Step]) -> None:
        wanted = [added for step in steps if (added := self._of_outstanding(step))]
        if not wanted:
            return
        try:
            await self._commit([o for step in wanted for added in step.values() for o in added])
        except AppError as error:  # not durable: these outputs never leave the box
            self._count(wanted, self._metered.drop)
            for request_id in dict.fromkeys(itertools.chain(*wanted)):
                self._stream.send(Cancel(request_id=request_id))
                self._metered.fail(has_begun=True)
                self._outstanding.fail(request_id, error)
            return
        self._count(wanted, self._metered.deliver)
        for step in wanted:
            self._hand_out(step)

    def _of_outstanding(self, step: Step) -> ByRequest:
        """The step's outputs that somebody still waits for."""
        by_request: ByRequest = {}
        for output in step.outputs:
            if output.request_id in self._outstanding.generations:
                by_request.setdefault(output.request_id, []).append(output)
            else:
                self._metered.drop(output, None)
        return by_request

    def _count(  # before they are handed out, which forgets those that end
        self, steps: list[ByRequest], count: Callable[[SequenceOutput, Generation], None]
    ) -> None:
        for step in steps:
            for request_id, added in step.items():
                generation = self._outstanding.generations.get(request_id)
                for output in added:
                    if generation is not None:
                        count(output, generation)
                    else:  # it was forgotten while its outputs were written
                        self._metered.drop(output, None)

    def _hand_out(self, step: ByRequest) -> None:
        for request_id, added in step.items():
            generation = self._outstanding.generations.get(request_id)
            if generation is None:
                continue
            generation.deliver(added)
            if generation.is_delivered:
                self._outstanding.forget(request_id)
