"""Work on a request that is done in a thread where there is much of it, so that nobody else
waits."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

LARGE_BODY_BYTES = 64 * 1024

T = TypeVar("T")


async def convert(size_bytes: int, work: Callable[[], T]) -> T:
    """What `work` makes of so many bytes."""
    return await asyncio.to_thread(work) if size_bytes > LARGE_BODY_BYTES else work()
