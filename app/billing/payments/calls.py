"""Calls of Stripe from the event loop: the SDK blocks, so it gets threads of its own.

Owns the threads. Not the loop's common ones: while Stripe does not answer, all of those would wait
for it.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

NUM_THREADS = 8

P = ParamSpec("P")
T = TypeVar("T")


class Calls:
    """One per process."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="stripe")

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(function, *args, **kwargs))

    def close(self) -> None:
        """Does not wait for calls under way: what they do is found again by the next start."""
        self._threads.shutdown(wait=False, cancel_futures=True)
