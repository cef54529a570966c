"""One request for embeddings between the relay that owns it and the handler that waits for it."""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any

from app.metering.records import Usage
from runtime.protocol import Embedded

if TYPE_CHECKING:
    from app.deployments.link import ReplicaLink

Answer = Callable[[Embedded, Usage], Awaitable[bytes]]  # makes what the caller is told


class Embedding:
    """The relay sets `answer`; the handler awaits it and may `cancel`."""

    answer: "asyncio.Task[bytes]"

    def __init__(self, request_id: str, link: "ReplicaLink") -> None:
        self.request_id = request_id
        self.link = link
        self.is_cancelled = False

    def __await__(self) -> Generator[Any, None, bytes]:
        """The answer, durably recorded. Whoever waits may be cancelled: the request itself goes on
        to its settlement."""
        return asyncio.shield(self.answer).__await__()

    def cancel(self) -> None:
        """Runs no more of the request's texts; those that ran are charged. Idempotent."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self.link.cancel(self.request_id)
