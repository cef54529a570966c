"""One generation between the relay that follows it and the handler that sends its answer."""

import asyncio
from typing import TYPE_CHECKING, Protocol

from app.api.endings import Ending
from app.core.errors import AppError
from app.metering.records import Tally
from runtime.protocol import SequenceOutput

if TYPE_CHECKING:
    from app.deployments.link import ReplicaLink

NO_ANSWER = ("abort", "refused")  # reasons of outputs that no caller is shown


class Answer(Protocol):
    """What a caller reads of a generation. The relay has it made before it settles, so that a
    request whose answer cannot be made is never charged as one that was answered."""

    def add(self, outputs: list[SequenceOutput], tally: Tally) -> bytes:
        """What can be sent now, by what was added; `tally` counts it already."""
        ...

    def finish(self, tally: Tally) -> bytes:
        """What is left to send, once every sequence has ended well."""
        ...


class Execution:
    """The relay calls `start`, `made_of`, `push`, `end`, `fail` and `give_up`; the handler sends
    what `next_body` returns and may `cancel`. Bytes wait here for as long as a slow client needs.
    """

    def __init__(
        self, request_id: str, link: "ReplicaLink", answer: Answer, *, is_stream: bool
    ) -> None:
        self.request_id = request_id
        self.link = link
        self._answer = answer
        self.is_stream = is_stream
        self.is_cancelled = False
        self.ending: Ending | None = None  # decided, whatever the replica still makes
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tally: Tally | None = None
        self._pending: list[bytes] = []
        self._is_over = False
        self._error: AppError | None = None
        self._waiter: asyncio.Future[None] | None = None

    # --- for the relay --------------------------------------------------------------------

    def start(self, tally: Tally) -> None:
        self._tally = tally
        if not self.started.done():
            self.started.set_result(None)

    def made_of(self, outputs: list[SequenceOutput]) -> bytes:
        """What is to be pushed for outputs that were counted, and at a good end of the rest.
        Raises whatever the making of the answer does."""
        if self.ending is not None:
            return b""
        shown = [output for output in outputs if output.finish_reason not in NO_ANSWER]
        body = self._answer.add(shown, self.tally) if shown else b""
        is_answered = self.tally.is_finished and self.tally.outcome()[0] == "completed"
        return body + self._answer.finish(self.tally) if is_answered else body

    def push(self, body: bytes) -> None:
        if body:
            self._pending.append(body)
            self._wake()

    def end(self) -> None:
        self._is_over = True
        self._wake()

    def fail(self, error: AppError) -> None:
        if not self.started.done():
            self.started.set_exception(error)
            self.started.exception()  # whoever waited may have gone
        self._error = self._error or error
        self.end()

    def give_up(self, ending: Ending) -> None:
        """Stops the replica. The caller is to be told by `fail`."""
        assert self.ending is None, "what was decided is on its way to the caller"
        self.ending = ending
        self.link.cancel(self.request_id)

    @property
    def is_started(self) -> bool:
        return self._tally is not None

    @property
    def tally(self) -> Tally:
        """What was used so far, of a request that was started."""
        assert self._tally is not None, "nothing is counted before the start"
        return self._tally

    # --- for the handler ------------------------------------------------------------------

    @property
    def is_sent(self) -> bool:
        """Whether all of the answer was returned by `next_body`."""
        return self._is_over and not self._pending and self._error is None

    def cancel(self) -> None:
        """Stops the replica; what it made until then is counted. Idempotent."""
        if not self._is_over:
            self.is_cancelled = True
            self.link.cancel(self.request_id)

    async def next_body(self) -> bytes:
        """What there is to send since the last call; empty at the end. Raises how the request
        failed."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._is_over:
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        body = b"".join(self._pending)
        self._pending.clear()
        return body

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
