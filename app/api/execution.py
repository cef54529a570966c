"""One generation between the relay that follows it and the handler that reads it."""

import asyncio
from typing import TYPE_CHECKING

from app.core.errors import AppError
from app.metering.records import Tally
from runtime.protocol import SequenceOutput

if TYPE_CHECKING:
    from app.deployments.link import ReplicaLink


class Execution:
    """The relay calls `start`, `push`, `end` and `fail`; the handler reads with `next_outputs` or
    `all_outputs` and may `cancel`. Outputs wait here for as long as a slow client needs."""

    def __init__(self, request_id: str, link: "ReplicaLink", *, is_stream: bool) -> None:
        self.request_id = request_id
        self.link = link
        self.is_stream = is_stream
        self.is_cancelled = False
        self.is_expired = False
        self.started: asyncio.Future[Tally] = asyncio.get_running_loop().create_future()
        self._pending: list[SequenceOutput] = []
        self._is_over = False
        self._error: AppError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wants_all = False

    # --- for the relay --------------------------------------------------------------------

    def start(self, tally: Tally) -> None:
        if not self.started.done():
            self.started.set_result(tally)

    def push(self, outputs: list[SequenceOutput]) -> None:
        """`abort` and `refused` are never an answer: what the caller gets instead is told to
        `end`."""
        self._pending += [o for o in outputs if o.finish_reason not in ("abort", "refused")]
        if not self._wants_all:
            self._wake()

    def end(self, error: AppError | None) -> None:
        self._is_over = True
        self._error = self._error or error
        self._wake()

    def fail(self, error: AppError) -> None:
        if not self.started.done():
            self.started.set_exception(error)
            self.started.exception()  # whoever waited may have gone
        self.end(error)

    def expire(self, error: AppError) -> None:
        """The deadline: the reader is told at once, the replica's last outputs are awaited."""
        self.is_expired = True
        self.cancel()
        self.fail(error)

    # --- for the handler ------------------------------------------------------------------

    @property
    def tally(self) -> Tally:
        """What was used so far; there once `started` is done."""
        return self.started.result()

    def cancel(self) -> None:
        """Stops the replica; what it made until then is counted. Idempotent."""
        if not self._is_over:
            self.is_cancelled = True
            self.link.cancel(self.request_id)

    def abandon(self) -> None:
        """Stops the replica for a fault of this box, so that nothing is owed. Idempotent."""
        if not self._is_over:
            self.link.cancel(self.request_id)

    async def next_outputs(self) -> list[SequenceOutput]:
        """What was added since the last call; empty at the end. Raises how the request failed."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._is_over:
                return []
            await self._wait()
        outputs, self._pending = self._pending, []
        return outputs

    async def all_outputs(self) -> list[SequenceOutput]:
        """Everything, once it is complete."""
        self._wants_all = True
        while not self._is_over:
            await self._wait()
        if self._error is not None:
            raise self._error
        return self._pending

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
