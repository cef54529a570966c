"""The clerk does its jobs again and again, and ends between two turns."""

import asyncio

from app.billing.clerk import Clerk


async def test_a_turn_under_way_ends_before_the_clerk() -> None:
    clerk = Clerk()
    begun, may_end = asyncio.Event(), asyncio.Event()
    done: list[str] = []

    async def turn() -> None:
        begun.set()
        await may_end.wait()
        done.append("transaction")

    clerk.add("books", 3600, turn)
    clerk.start()
    await begun.wait()
    closing = asyncio.create_task(clerk.close())
    await asyncio.sleep(0)
    may_end.set()
    await closing
    assert done == ["transaction"]


async def test_a_turn_that_does_not_end_is_cancelled() -> None:
    clerk = Clerk()
    begun, is_cancelled = asyncio.Event(), asyncio.Event()

    async def turn() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()

    clerk.add("books", 3600, turn)
    clerk.start()
    await begun.wait()
    await clerk.close(patience_seconds=0.01)
    assert is_cancelled.is_set()


async def test_a_job_is_done_again_when_it_was_woken_in_its_turn() -> None:
    clerk = Clerk()
    again = asyncio.Event()
    turns: list[int] = []

    async def turn() -> None:
        turns.append(len(turns))
        if len(turns) == 1:
            clerk.wake("books")
        else:
            again.set()

    clerk.add("books", 3600, turn)
    clerk.start()
    await again.wait()
    await clerk.close()
    assert turns == [0, 1]
