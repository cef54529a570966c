"""A server and its peer in one event loop, joined by a socketpair."""

import asyncio
import socket
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import msgspec

from runtime.protocol import (
    LENGTH,
    Failed,
    FromWorker,
    Manifest,
    Message,
    Ready,
    encode_frame,
)
from runtime.server.connection import Connection, Server

READY = Ready(
    manifest=Manifest(kind="decoder", format="huggingface", num_parameters=1, weight_bytes=1),
    memory_bytes=1,
)
M = TypeVar("M", bound=Message)

_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class Stream:
    """`async with Stream(server) as peer`. Everything received is kept in `received`."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.received: list[Message] = []

    async def __aenter__(self) -> "Stream":
        theirs, ours = socket.socketpair()
        loop = asyncio.get_running_loop()
        _, self.connection = await loop.connect_accepted_socket(
            lambda: Connection(self.server, READY), theirs
        )
        # A limit of nothing: what is not read stays in the kernel, for tests of back-pressure.
        self.reader, self.writer = await asyncio.open_connection(sock=ours, limit=1)
        assert await self.receive() == READY
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.writer.close()
        async with asyncio.timeout(10):
            await self.connection.done
        self.server.close()

    def send(self, *messages: Message) -> None:
        self.writer.write(b"".join(map(encode_frame, messages)))

    async def receive(self) -> Message | None:
        """The next message; None at the end of the stream."""
        try:
            async with asyncio.timeout(20):
                prefix = await self.reader.readexactly(LENGTH.size)
                message = _decoder.decode(await self.reader.readexactly(LENGTH.unpack(prefix)[0]))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return None
        self.received.append(message)
        return message

    async def expect(self, kind: type[M], accept: Callable[[M], bool] = lambda _: True) -> M:
        while (message := await self.receive()) is not None:
            if isinstance(message, kind) and accept(message):
                return message
        raise AssertionError(f"the stream ended before a {kind.__name__}: {self.received}")

    async def expect_failed(self, request_id: str, code: str, status: int) -> Failed:
        failed = await self.expect(Failed)
        assert (failed.request_id, failed.error.code, failed.error.status) == (
            request_id,
            code,
            status,
        )
        return failed

    async def end(self) -> int:
        """Read to the end of the stream; the exit status."""
        while await self.receive() is not None:
            pass
        async with asyncio.timeout(10):
            return await self.connection.done
