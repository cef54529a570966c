"""Tells listeners in this process that something changed. Carries names, never data: whoever
listens looks at the database, so a missed or repeated notice does no harm."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator


class Broadcast:
    """Topics are plain strings such as `version:<id>` or `models`."""

    def __init__(self) -> None:
        self._listeners: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._is_closed = False

    def publish(self, topic: str) -> None:
        for event in self._listeners.get(topic, ()):
            event.set()

    def close(self) -> None:
        """Ends every listener, so that open pages do not hold up a shutdown."""
        self._is_closed = True
        for topic in list(self._listeners):
            self.publish(topic)

    async def listen(self, topic: str, heartbeat_seconds: float = 15.0) -> AsyncIterator[bool]:
        """Yields True at once and after each change, False when nothing changed for a while."""
        event = asyncio.Event()
        self._listeners[topic].add(event)
        try:
            yield True
            while not self._is_closed:
                try:
                    await asyncio.wait_for(event.wait(), heartbeat_seconds)
                except TimeoutError:
                    yield False
                    continue
                event.clear()
                if not self._is_closed:
                    yield True
        finally:
            self._listeners[topic].discard(event)
            if not self._listeners[topic]:
                del self._listeners[topic]
