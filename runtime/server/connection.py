"""One stream: frames, back-pressure and draining, and the interface of what is served over it.

Does not own what becomes of a request: see `decoder.py` and `tensor.py`.
"""

import asyncio
import logging
from abc import ABC, abstractmethod

import msgspec

from runtime.protocol import (
    LENGTH,
    Drain,
    Failed,
    Fatal,
    FrameError,
    Message,
    Ready,
    Stats,
    ToWorker,
    WireError,
    check_frame_length,
    encode_frame,
)

logger = logging.getLogger(__name__)

STATS_SECONDS = 1.0
MAX_UNSENT_BYTES = 256 * 1024  # beyond it nothing is read and nothing new is produced

_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)


def wire_error(error: BaseException) -> WireError:
    """What a caller is told: the typed error that `error` carries, else nothing of its text."""
    typed = getattr(error, "error", None)
    if isinstance(typed, WireError):
        return typed
    logger.error("a request failed unexpectedly", exc_info=error)
    return server_error("internal_error", "The model's process failed on this request.", 500)


def server_error(code: str, message: str, status: int) -> WireError:
    """A failure of ours."""
    return WireError(type="server_error", code=code, message=message, status=status)


def queue_full() -> WireError:
    """The refusal of a request beyond what may wait."""
    message = "The model has too many requests waiting. Try again."
    return WireError(type="rate_limit_error", code="queue_full", message=message, status=429)


def too_many_grammars() -> WireError:
    """The refusal of a caller whose schemas are compiled more slowly than they come."""
    message = (
        "Too many different schemas of yours are waiting to be prepared. Try again, and use the "
        "same schema in several requests where you can."
    )
    return WireError(type="rate_limit_error", code="too_many_grammars", message=message, status=429)


def output_too_large() -> WireError:
    """The end of a request whose answer fits no frame."""
    message = "The output is too large for one answer. Ask for less per request."
    return WireError(
        type="invalid_request_error", code="output_too_large", message=message, status=413
    )


def cancelled() -> WireError:
    """The end of a request that was cancelled before it produced anything."""
    message = "The request was cancelled."
    return WireError(type="invalid_request_error", code="cancelled", message=message, status=499)


class Connection(asyncio.Protocol):
    """Frames in and out. What one turn of the loop produces leaves in one write.

    When the peer stops reading, this stops reading from it and pauses the server, so that unsent
    data stays bounded. `done` resolves to the process's exit status when the stream is over.
    """

    def __init__(self, server: "Server", ready: Ready) -> None:
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._ready = ready
        self._received = bytearray()
        self._unsent: list[bytes] = []
        self._is_paused = False
        self._exit_status = 0
        self._last_stats = Stats()
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle

    # --- asyncio.Protocol ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        self.send(self._ready)
        self._server.attach(self)
        self._timer = self._loop.call_later(STATS_SECONDS, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        if not self.done.done():
            self.done.set_result(self._exit_status)

    def pause_writing(self) -> None:
        self._is_paused = True
        self._transport.pause_reading()
        self._server.pause()

    def resume_writing(self) -> None:
        self._is_paused = False
        self._server.resume()
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            self._handle_frames()
        except (FrameError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            logger.error("closing the stream: %s", error)
            self._exit_status = 1
            self._transport.abort()

    # --- frames -------------------------------------------------------------------------

    def _handle_frames(self) -> None:
        """Handle the complete frames received so far and keep the rest."""
        at, end = 0, len(self._received)
        with memoryview(self._received) as view:
            while end - at >= LENGTH.size:
                body_at = at + LENGTH.size
                length = check_frame_length(bytes(view[at:body_at]))
                if end - body_at < length:
                    break
                at = body_at + length
                message = _decoder.decode(view[body_at:at])
                if isinstance(message, Drain):
                    self.drain()
                else:
                    self._server.handle(message)
        del self._received[:at]

    def send(self, message: Message) -> None:
        """Queue a message. Raises `ValueError` when it does not fit a frame."""
        frame = encode_frame(message)
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(frame)

    def _flush(self) -> None:
        frames, self._unsent = self._unsent, []
        if frames and not self._transport.is_closing():
            self._transport.write(b"".join(frames) if len(frames) > 1 else frames[0])
        self._close_when_drained()

    # --- ending -------------------------------------------------------------------------

    def drain(self) -> None:
        """Refuse new requests, and close once the last is answered."""
        if not self._server.is_draining:
            logger.info("draining %d requests", self._server.num_requests)
            self._server.drain()
        self._loop.call_soon(self._flush)

    def fail(self, error: WireError) -> None:
        """Tell the peer that this process cannot go on, and close."""
        logger.error("giving up: %s", error.message)
        self._exit_status = 1
        self.send(Fatal(error=error))
        self._flush()
        self._transport.close()

    def _close_when_drained(self) -> None:
        if self._server.is_draining and not self._server.num_requests and not self._unsent:
            self._transport.close()  # after what is buffered has left

    def _tick(self) -> None:
        self._timer = self._loop.call_later(STATS_SECONDS, self._tick)
        self._server.tick()
        stats = self._server.stats()
        if stats != self._last_stats and not self._is_paused:
            self._last_stats = stats
            self.send(stats)
        self._close_when_drained()


class Server(ABC):
    """What a connection serves. All of it runs on the loop's thread."""

    connection: Connection
    is_draining = False

    def attach(self, connection: Connection) -> None:
        """Begin to serve `connection`."""
        self.connection = connection

    @abstractmethod
    def handle(self, message: ToWorker) -> None:
        """Act on a frame. Raises `FrameError` for one that this kind of program has no use for."""

    @property
    @abstractmethod
    def num_requests(self) -> int:
        """Requests not answered yet."""

    @abstractmethod
    def stats(self) -> Stats: ...

    @abstractmethod
    def close(self) -> None:
        """Stop at once, whatever is unfinished."""

    def drain(self) -> None:
        """Refuse new requests from here on."""
        self.is_draining = True

    def tick(self) -> None:  # noqa: B027 - most have nothing to do
        """Called every `STATS_SECONDS`."""

    def pause(self) -> None:  # noqa: B027
        """Produce nothing more until `resume`: the peer does not read."""

    def resume(self) -> None:  # noqa: B027
        """The peer reads again."""

    def refuse(self, request_id: str, error: WireError) -> None:
        self.connection.send(Failed(request_id=request_id, error=error))

    def refuse_draining(self, request_id: str) -> None:
        message = "The model is stopping and takes no new requests. Try again."
        self.refuse(request_id, server_error("draining", message, 503))
