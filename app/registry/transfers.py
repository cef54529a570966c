"""One upload's transfer: who may write to it now, and a connection's bytes as they come; and what
is asked of any sender, that they go on.

Knows no database and no file; `uploads.py` puts the bytes where they belong.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from app.core.errors import Conflict, TooLarge
from app.registry.received_file import ReceivedFile

BUFFER_BYTES = 1024**2  # written and hashed at once, in a thread
STALL_SECONDS = 60.0
LEAST_BYTES = 16 * 1024  # sent in that time by any client that still sends


class Pace:
    """Whether a sender goes on: until their end, `LEAST_BYTES` in `stall_seconds` of waiting for
    them. The work on what they sent is not their time."""

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._left_seconds = stall_seconds
        self._num_bytes = 0

    @asynccontextmanager
    async def waiting(self) -> AsyncGenerator[asyncio.Timeout]:
        """Around the wait for their next bytes. Raises `TimeoutError`."""
        clock = asyncio.get_running_loop()
        began_at = clock.time()
        try:
            async with asyncio.timeout(self._left_seconds) as timeout:
                yield timeout
        finally:
            self._left_seconds -= clock.time() - began_at

    def came(self, num_bytes: int) -> None:
        """So many bytes of theirs."""
        self._num_bytes += num_bytes
        if self._num_bytes >= LEAST_BYTES:
            self._num_bytes, self._left_seconds = 0, self._stall_seconds


class Transfer:
    """What this process knows of an upload under way: who may write, and the hash so far."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.num_callers = 0
        self.file: ReceivedFile | None = None
        self.waiting: asyncio.Timeout | None = None  # for the client's next bytes

    def interrupt(self) -> None:
        """Ends the wait for bytes of whoever is writing."""
        if self.waiting is not None and not self.waiting.expired():
            self.waiting.reschedule(asyncio.get_running_loop().time())


class Source:
    """A connection's chunks, gathered into pieces worth a thread. Why it ended early is kept in
    `failure`, to be raised once the bytes that came before are safe."""

    def __init__(self, transfer: Transfer, chunks: AsyncIterator[bytes], room_bytes: int) -> None:
        self._transfer = transfer
        self._chunks = chunks
        self._room_bytes = room_bytes
        self._pace = Pace(STALL_SECONDS)
        self._is_ended = False
        self.failure: Exception | None = None

    async def next_piece(self) -> bytes:
        """Empty at the end."""
        buffer = bytearray()
        while not self._is_ended and len(buffer) < BUFFER_BYTES:
            chunk = await self._next_chunk()
            if len(chunk) > self._room_bytes:
                self._end(TooLarge("There are more bytes than Upload-Length announced."))
                break
            self._room_bytes -= len(chunk)
            buffer += chunk
        return bytes(buffer)

    async def _next_chunk(self) -> bytes:
        try:
            async with self._pace.waiting() as self._transfer.waiting:
                if self._transfer.num_callers > 1:
                    raise TimeoutError
                chunk = await anext(self._chunks, None)
        except TimeoutError:
            self._end(
                Conflict(
                    "Another transfer took over, or next to nothing came for a while. Ask for the "
                    "offset (HEAD) and go on from there.",
                    code="interrupted",
                )
            )
        except Exception as error:  # noqa: BLE001 - the connection's own, raised by the caller
            self._end(error)
        else:
            if chunk is not None:
                self._pace.came(len(chunk))
                return chunk
            self._end(None)
        finally:
            self._transfer.waiting = None
        return b""

    def _end(self, failure: Exception | None) -> None:
        self._is_ended = True
        self.failure = failure
