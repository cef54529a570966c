"""One stream of frames to a worker or build process, as an asyncio protocol.

Owns framing, the check of lengths and schemas, coalesced writes and both directions of
back-pressure. Does not know what the messages mean.
"""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import msgspec

from runtime.protocol import LENGTH, FrameError, Message, check_frame_length, encode_frame

PREFIX_BYTES = LENGTH.size
M = TypeVar("M")


class FrameStream(asyncio.Protocol, Generic[M]):
    """Calls `on_message` for each message in order and `on_lost`, once, with the reason why there
    will be no more. A `FrameError` raised by `on_message` ends the stream too."""

    def __init__(
        self,
        decoder: "msgspec.msgpack.Decoder[M]",
        on_message: Callable[[M], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._decoder = decoder
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unparsed = bytearray()
        self._unsent: list[bytes] = []
        self._is_flush_due = False
        self._is_reading_paused = False
        self._writable = asyncio.Event()
        self.is_closed = False

    # --- asyncio's callbacks --------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not all event loops' transports inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._writable.set()
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self.is_closed:
            return
        try:
            self._parse(data)
        except FrameError as error:
            self.close(f"sent an invalid frame: {error}")
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            self.close(f"sent a message that breaks the protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(f"lost its connection: {exc}" if exc else "closed its connection")

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
        self._flush()

    # --- for the owner --------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Sent with everything else of this turn of the loop, in one write. Raises `ValueError`
        when the message is too large for a frame; does nothing on a closed stream."""
        self.send_frame(encode_frame(message))

    def send_frame(self, frame: bytes) -> None:
        if self.is_closed:
            return
        self._unsent.append(frame)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    async def writable(self) -> None:
        """Waits while the peer does not read what was sent. Returns on a closed stream."""
        if not self._writable.is_set():
            await self._writable.wait()

    def pause_reading(self) -> None:
        if self._transport is not None and not self.is_closed and not self._is_reading_paused:
            self._is_reading_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and not self.is_closed and self._is_reading_paused:
            self._is_reading_paused = False
            self._transport.resume_reading()

    def close(self, reason: str) -> None:
        """Ends the stream at once. Only the first reason counts."""
        if self.is_closed:
            return
        self.is_closed = True
        self._unsent.clear()
        self._unparsed = bytearray()  # not cleared in place: it may be being parsed
        self._writable.set()
        if self._transport is not None:
            self._transport.abort()
        self._on_lost(reason)

    # --- the bytes ------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        """Whole frames are decoded straight from `data`; only a started one is copied."""
        chunk: bytes | bytearray = data
        if self._unparsed:
            self._unparsed += data
            chunk = self._unparsed
        at, end = 0, len(chunk)
        with memoryview(chunk) as view:
            while end - at >= PREFIX_BYTES:
                body_at = at + PREFIX_BYTES
                frame_end = body_at + check_frame_length(bytes(view[at:body_at]))
                if frame_end > end:
                    break
                self._on_message(self._decoder.decode(view[body_at:frame_end]))
                if self.is_closed:
                    return
                at = frame_end
        if chunk is self._unparsed:
            del self._unparsed[:at]
        else:
            self._unparsed += data[at:]

    def _flush(self) -> None:
        self._is_flush_due = False
        if not self._unsent or self._transport is None or not self._writable.is_set():
            return
        frames, self._unsent = self._unsent, []
        self._transport.write(frames[0] if len(frames) == 1 else b"".join(frames))
