"""What is asked of senders, on a clock that the tests move."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from app.registry.transfers import LEAST_BYTES, Pace

STALL_SECONDS = 60.0


class Clock:
    """The event loop's, ahead of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._time = loop.time
        self.ahead_seconds = 0.0

    def time(self) -> float:
        return self._time() + self.ahead_seconds


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Clock]:
    loop = asyncio.get_running_loop()
    clock = Clock(loop)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", clock.time)
        yield clock


async def goes_on(pace: Pace, clock: Clock, seconds: float, num_bytes: int) -> bool:
    """Whether a sender is still listened to who brings so much after such a wait."""
    try:
        async with pace.waiting():
            clock.ahead_seconds += seconds
            for _ in range(3):
                await asyncio.sleep(0)
    except TimeoutError:
        return False
    pace.came(num_bytes)
    return True


async def test_one_who_brings_a_byte_now_and_then_is_not_waited_for(clock: Clock) -> None:
    pace = Pace(STALL_SECONDS)
    assert await goes_on(pace, clock, 29, 1)
    assert await goes_on(pace, clock, 29, 1)
    assert not await goes_on(pace, clock, 29, 1)


async def test_one_who_is_slow_is_waited_for(clock: Clock) -> None:
    pace = Pace(STALL_SECONDS)
    for _ in range(100):  # some 500 bytes a second
        assert await goes_on(pace, clock, 16, LEAST_BYTES // 2)
    assert await goes_on(pace, clock, 59, 1)  # as long as a page takes to be loaded again


async def test_the_work_on_what_came_is_not_the_senders_time(clock: Clock) -> None:
    pace = Pace(STALL_SECONDS)
    for _ in range(5):
        assert await goes_on(pace, clock, 1, 1)
        clock.ahead_seconds += 3600
