"""Answers that a client may leave: the event stream, and the watch for a disconnect."""

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from litestar.response.base import ASGIResponse

from app.api.dialect import Dialect, usage_of
from app.api.errors import internal_error
from app.api.execution import Execution
from app.api.request_ids import id_headers
from app.core.errors import AppError
from app.core.ids import new_id
from app.metering.records import Tally
from runtime.protocol import SequenceOutput

if TYPE_CHECKING:
    from litestar.types import Receive, Scope, Send

# Most answers are out by then, and a task for each of them would be wasted.
WATCH_AFTER_SECONDS = 0.05

log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()


class Cancellable(Protocol):
    """What a client that leaves no longer wants."""

    def cancel(self) -> None: ...


class CancelledOnDisconnect:
    """While the block runs, a client that goes away cancels `work`, and so does the end of the
    handler's task. One that went before the block is noticed in it."""

    def __init__(self, receive: "Receive", work: Cancellable) -> None:
        self._receive = receive
        self._work = work
        self._watch: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_SECONDS, self._begin)

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._work.cancel()

    def _begin(self) -> None:
        self._watch = asyncio.get_running_loop().create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._work.cancel()


class StreamedAnswer:
    """A dialect's server-sent events, ended by its last word."""

    def __init__(self, dialect: Dialect[Any]) -> None:
        self._dialect = dialect
        self._has_begun = False

    def add(self, outputs: list[SequenceOutput], tally: Tally) -> bytes:
        opening = () if self._has_begun else self._dialect.opening(usage_of(tally))
        self._has_begun = True
        return _event_bytes([*opening, *self._dialect.events(outputs)])

    def finish(self, tally: Tally) -> bytes:
        return _event_bytes(self._dialect.closing(usage_of(tally))) + self._dialect.end


class EventStream(ASGIResponse):
    """Sends what is streamed of one execution; where it fails, an error as the last event."""

    _should_set_content_length = False

    def __init__(self, execution: Execution, dialect: Dialect[Any], first: bytes) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
                **id_headers(execution.request_id),
            },
        )
        self._execution = execution
        self._dialect = dialect
        self._first = first

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        with CancelledOnDisconnect(receive, self._execution):
            await self.start_response(send)
            try:
                await self._send_events(send)
            except AppError as error:
                await self._fail(send, error)
            except Exception:
                self._execution.cancel()
                error_id = new_id("err")
                log.exception("%s in a stream of %s", error_id, self._dialect.route)
                await self._fail(send, internal_error(error_id))

    async def _send_events(self, send: "Send") -> None:
        body = self._first
        while not self._execution.is_sent:
            await _send_bytes(send, body, more=True)
            body = await self._execution.next_body()
        await _send_bytes(send, body, more=False)

    async def _fail(self, send: "Send", error: AppError) -> None:
        await _send_bytes(send, _event_bytes([self._dialect.failure(error)]), more=False)


def _event_bytes(events: Sequence[msgspec.Struct]) -> bytes:
    return b"".join(map(_event_line, events))


def _event_line(event: msgspec.Struct) -> bytes:
    """With the event's name in front, where its struct has one."""
    data = b"data: %b\n\n" % _encoder.encode(event)
    name = event.__struct_config__.tag
    return b"event: %b\n%b" % (name.encode(), data) if isinstance(name, str) else data


async def _send_bytes(send: "Send", body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
