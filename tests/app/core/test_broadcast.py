"""Listeners are told of changes, and nothing is kept for those who left."""

import asyncio
from contextlib import aclosing

from app.core.broadcast import Broadcast


async def test_a_listener_hears_at_once_and_after_each_change() -> None:
    broadcast = Broadcast()
    async with aclosing(broadcast.listen("models", heartbeat_seconds=0.01)) as notices:
        assert await anext(notices) is True
        assert await anext(notices) is False  # a heartbeat: nothing changed
        asyncio.get_running_loop().call_soon(broadcast.publish, "models")
        assert await anext(notices) is True
    broadcast.publish("models")  # nobody listens any more


async def test_closing_ends_every_listener() -> None:
    broadcast = Broadcast()
    notices = broadcast.listen("models", heartbeat_seconds=60)
    assert await anext(notices) is True
    asyncio.get_running_loop().call_soon(broadcast.close)
    assert [notice async for notice in notices] == []
