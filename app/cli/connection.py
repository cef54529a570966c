"""A connection of the box's HTTP server that a client cannot hold on to by not reading.

Owns how long unsent bytes may wait for their reader, whatever answer they are of. That the
request behind them is cancelled follows: its handler sees a client that left.
"""

import asyncio
import socket
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

STALL_SECONDS = 30.0
LEAST_BYTES = 16 * 1024  # taken in that time by any client that still reads


class Connection(HttpToolsProtocol):
    """Drops a client that takes less than `LEAST_BYTES` of a backlog in `stall_seconds`."""

    stall_seconds: ClassVar[float] = STALL_SECONDS

    _stall: asyncio.TimerHandle | None = None
    _unsent_bytes = 0

    def connection_made(  # type: ignore[override] - as its base
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        # What is less than the transport calls a backlog can only be timed by the kernel.
        connected = transport.get_extra_info("socket")
        if connected is None or connected.family not in (socket.AF_INET, socket.AF_INET6):
            return
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(self.stall_seconds * 1000)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def pause_writing(self) -> None:
        """From here on the handler waits in its next `send`, so the backlog only shrinks."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_reader(self) -> None:
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(self.stall_seconds, self._check_reader)

    def _check_reader(self) -> None:
        if self._unsent_bytes - self.transport.get_write_buffer_size() < LEAST_BYTES:
            self.transport.abort()
        else:
            self._wait_for_reader()

    def _stop_waiting(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
