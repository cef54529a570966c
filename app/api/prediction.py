"""One tensor request between the relay that owns it and the handler that waits for it."""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from app.metering.records import Usage
from runtime.protocol import Predicted

if TYPE_CHECKING:
    from app.deployments.link import ReplicaLink

T = TypeVar("T")
Answer = Callable[[Predicted, Usage], Awaitable[T]]  # makes what the caller is told


class Prediction(Generic[T]):
    """The relay sets `answer`; the handler awaits it and may `cancel`."""

    answer: "asyncio.Task[T]"

    def __init__(self, request_id: str, link: "ReplicaLink") -> None:
        self.request_id = request_id
        self.link = link
        self.is_cancelled = False

    def __await__(self) -> Generator[Any, None, T]:
        """The answer, durably recorded. Whoever waits may be cancelled: the request itself goes on
        to its settlement."""
        return asyncio.shield(self.answer).__await__()

    def cancel(self) -> None:
        """Drops the request if it has not run; a run is finished, and charged. Idempotent."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self.link.withdraw(self.request_id)
