"""Work on a request that is done in a thread where there is much of it, so that nobody else
waits. The threads do nothing else: behind files, which take minutes, requests would wait for them.
"""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LARGE_BODY_BYTES = 64 * 1024
NUM_CONVERTERS = 2  # large bodies that are taken apart at once; others wait

T = TypeVar("T")

_converters = ThreadPoolExecutor(NUM_CONVERTERS, thread_name_prefix="bodies")


async def convert(size_bytes: int, work: Callable[[], T]) -> T:
    """What `work` makes of so many bytes."""
    if size_bytes <= LARGE_BODY_BYTES:
        return work()
    context = contextvars.copy_context()  # what is logged names the request
    return await asyncio.get_running_loop().run_in_executor(_converters, context.run, work)
