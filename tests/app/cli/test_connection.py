"""A reader that stalls loses its connection, and what it asked for is cancelled."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from app.api.streaming import CancelledOnDisconnect
from app.cli.connection import LEAST_BYTES, Connection


class Impatient(Connection):
    stall_seconds = 0.2


class Work:
    """An answer without end, until it is cancelled."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self.has_ended = asyncio.Event()

    def cancel(self) -> None:
        self.is_cancelled = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with CancelledOnDisconnect(receive, self):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not self.is_cancelled:
                body = {"type": "http.response.body", "body": bytes(65536), "more_body": True}
                await send(body)
                await asyncio.sleep(0)
        self.has_ended.set()


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
async def server(work: Work) -> AsyncIterator[uvicorn.Server]:
    config = uvicorn.Config(work, http=Impatient, log_config=None, lifespan="off", port=0)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    async with asyncio.timeout(10):
        while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
            await asyncio.sleep(0.005)
    yield server
    server.should_exit = True
    await serving


async def test_a_reader_that_stalls_is_let_go(server: uvicorn.Server, work: Work) -> None:
    port = server.servers[0].sockets[0].getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
        async with asyncio.timeout(10):
            await work.has_ended.wait()
            while server.server_state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert work.is_cancelled


async def test_the_kernel_times_what_is_less_than_a_backlog(
    server: uvicorn.Server, work: Work
) -> None:
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system has no TCP_USER_TIMEOUT")
    port = server.servers[0].sockets[0].getsockname()[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(10):
        while not server.server_state.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    (connection,) = server.server_state.connections
    connected = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
    assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 200
    writer.close()


class Backlog:
    """A transport with unsent bytes that is also the loop whose timer the test fires."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.is_aborted = False
        self.due: Callable[[], None] | None = None

    def get_extra_info(self, name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return self.num_bytes

    def abort(self) -> None:
        self.is_aborted = True

    def call_later(self, seconds: float, call: Callable[[], None]) -> "Backlog":
        self.due = call
        return self

    def cancel(self) -> None:
        self.due = None

    def elapse(self, num_bytes: int) -> None:
        """A period in which so many bytes were taken."""
        self.num_bytes -= num_bytes
        due, self.due = self.due, None
        assert due is not None
        due()


def test_a_slow_reader_is_served_while_it_reads(work: Work) -> None:
    backlog: Any = Backlog(10 * LEAST_BYTES)
    config = uvicorn.Config(work, log_config=None)
    connection = Connection(config, ServerState(), {}, backlog)
    connection.connection_made(backlog)
    connection.pause_writing()
    backlog.elapse(LEAST_BYTES)
    backlog.elapse(8 * LEAST_BYTES)
    assert not backlog.is_aborted
    connection.resume_writing()
    assert backlog.due is None
    connection.pause_writing()
    backlog.elapse(LEAST_BYTES - 1)
    assert backlog.is_aborted
