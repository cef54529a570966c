"""The requests under way on one replica, and the memory of those that just ended."""

import asyncio
from collections import OrderedDict

from app.core.clock import monotonic_ns
from app.core.errors import AppError
from app.deployments.claims import FalseClaim, check_device_time
from app.deployments.embedding import Embedding
from app.deployments.generation import Generation
from runtime.protocol import Predicted

NUM_REMEMBERED = 8192


class Call:
    """One tensor request under way."""

    __slots__ = ("answer", "is_sent", "sent_ns")

    def __init__(self, answer: "asyncio.Future[Predicted]") -> None:
        self.answer = answer
        self.is_sent = False  # it waits while the worker does not read
        self.sent_ns = monotonic_ns()

    def check(self, device_ns: int, num_devices: int) -> int:
        """The device time that is claimed for it. Raises `FalseClaim` where it took no such."""
        if device_ns < 0:
            raise FalseClaim("sent a negative measurement")
        check_device_time(device_ns, monotonic_ns() - self.sent_ns, num_devices)
        return device_ns

    def fail(self, error: AppError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Outstanding:
    """Generations, embeddings and calls by request id."""

    def __init__(self) -> None:
        self.generations: dict[str, Generation] = {}
        self.embeddings: dict[str, Embedding] = {}
        self.calls: dict[str, Call] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._idle = asyncio.Event()

    def __len__(self) -> int:
        return len(self.generations) + len(self.embeddings) + len(self.calls)

    def __contains__(self, request_id: str) -> bool:
        return any(request_id in kind for kind in (self.generations, self.embeddings, self.calls))

    def prepared(self, request_id: str) -> Generation | Embedding | None:
        """The request that is prepared first and started then."""
        return self.generations.get(request_id) or self.embeddings.get(request_id)

    def forget(self, request_id: str) -> None:
        """The request is over; a late answer to it is expected, not a breach."""
        self.generations.pop(request_id, None)
        self.embeddings.pop(request_id, None)
        self.calls.pop(request_id, None)
        self._ended[request_id] = None
        if len(self._ended) > NUM_REMEMBERED:
            self._ended.popitem(last=False)
        if not self:
            self._idle.set()

    def fail(self, request_id: str, error: AppError) -> None:
        """Ends a request with an error, if it is still under way."""
        request = self.calls.get(request_id) or self.prepared(request_id)
        if request is not None:
            self.forget(request_id)
            request.fail(error)

    def expect_ended(self, request_id: str) -> None:
        """Raises `FalseClaim` for a request that never was."""
        if request_id not in self._ended:
            raise FalseClaim("answered a request that it was not sent")

    async def wait_idle(self) -> None:
        """Returns when no request is under way."""
        while self:
            self._idle.clear()
            await self._idle.wait()
