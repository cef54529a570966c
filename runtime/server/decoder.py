"""Serves a decoder: prepare, wait for the go-ahead, run with all others, stream.

Owns the life of a request from `Generate` to its last output. Does not run the engine: see
`engine_thread.py`.
"""

import asyncio
import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec

from runtime.protocol import (
    Cancel,
    Failed,
    FrameError,
    Generate,
    Prepared,
    SequenceOutput,
    Serve,
    Start,
    Stats,
    Step,
    ToWorker,
    WireError,
)
from runtime.server.compiling import CompileQueue
from runtime.server.connection import (
    Connection,
    Server,
    cancelled,
    output_too_large,
    queue_full,
    server_error,
    too_many_grammars,
    wire_error,
)
from runtime.server.engine_thread import Engine, EngineThread, PreparedRequest
from runtime.server.memory import WaitingMemory, prompt_bytes, text_bytes

logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # a prepared request waits this long for its `Start`
DRAINING_START_SECONDS = 2.0  # and this long once the worker drains


class _Request:
    """A request that is not answered yet: being prepared, prepared, or (without either) running."""

    __slots__ = ("deadline", "is_running", "num_choices", "prepared", "text_bytes")

    def __init__(self, message: Generate) -> None:
        self.num_choices = message.num_choices
        self.text_bytes = text_bytes(message)
        self.prepared: PreparedRequest | None = None
        self.deadline = 0.0  # for `Start`; means something while `prepared` is set
        self.is_running = False


class DecoderServer(Server):
    """Generation, with at most `max_waiting` requests beside those that can run at once."""

    def __init__(self, engine: Engine, config: Serve) -> None:
        self._engine = engine
        self._max_requests = config.max_sequences + config.max_waiting
        self._requests: dict[str, _Request] = {}
        self._memory = WaitingMemory()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._compiles = CompileQueue()
        self._loop: asyncio.AbstractEventLoop
        self._thread: EngineThread
        self._is_paused = False
        self._num_held_credits = 0
        self._before = engine.stats()  # what warming up has counted

    def attach(self, connection: Connection) -> None:
        super().attach(connection)
        self._loop = asyncio.get_running_loop()
        self._thread = EngineThread(self._engine, self)

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def handle(self, message: ToWorker) -> None:
        match message:
            case Generate():
                self._generate(message)
            case Start():
                self._start(message.request_id)
            case Cancel():
                self._cancel(message.request_id)
            case _:
                raise FrameError(f"a decoder takes no {type(message).__name__}")

    # --- before a request runs ----------------------------------------------------------

    def _generate(self, message: Generate) -> None:
        request_id = message.request_id
        if request_id in self._requests:
            raise FrameError("a request's id is already in use")
        if self.is_draining:
            self.refuse_draining(request_id)
            return
        request = _Request(message)
        # A text's ids and the choices' copies are counted once the request is prepared.
        num_bytes = request.text_bytes + prompt_bytes(len(message.token_ids or ()), 0)
        is_full = len(self._requests) >= self._max_requests
        if is_full or not self._memory.hold(request_id, num_bytes):
            self.refuse(request_id, queue_full())
        else:
            self._requests[request_id] = request
            self._submit(message, request)

    def _submit(self, message: Generate, request: _Request) -> None:
        """Have it prepared: where its grammar must be compiled first, out of the others' way."""
        grammar = self._engine.to_compile(message)
        if grammar is None:
            self._executor.submit(self._prepare_at_once, message, request)
        elif not self._compiles.submit(
            message.fairness_key, grammar, partial(self._prepare, message, request)
        ):
            self.end(message.request_id, too_many_grammars())

    def _prepare_at_once(self, message: Generate, request: _Request) -> None:
        """On the executor's thread. A grammar may have been pushed out since."""
        if self._engine.to_compile(message) is None:
            self._prepare(message, request)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._submit, message, request)

    def _prepare(self, message: Generate, request: _Request) -> None:
        """On a thread of one of the executors."""
        if self._requests.get(message.request_id) is not request:
            return  # cancelled before its turn
        result: PreparedRequest | WireError
        try:
            result = self._engine.prepare(message)
        except BaseException as error:  # noqa: BLE001 - a tokenizer or template may raise anything
            result = wire_error(error)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._prepared, message.request_id, request, result)

    def _prepared(
        self, request_id: str, request: _Request, result: PreparedRequest | WireError
    ) -> None:
        if self._requests.get(request_id) is not request:
            return  # cancelled meanwhile
        if isinstance(result, WireError):
            self.end(request_id, result)
            return
        ids_bytes = prompt_bytes(result.num_prompt_tokens, request.num_choices)
        if not self._memory.hold(request_id, request.text_bytes + ids_bytes):
            self.end(request_id, queue_full())
            return
        request.prepared = result
        seconds = DRAINING_START_SECONDS if self.is_draining else START_SECONDS
        request.deadline = time.monotonic() + seconds
        self.connection.send(
            Prepared(
                request_id=request_id,
                num_prompt_tokens=result.num_prompt_tokens,
                max_tokens=result.max_tokens,
            )
        )

    def _start(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is None or request.prepared is None:
            message = "The request is not prepared, was cancelled, or waited too long."
            self.refuse(request_id, server_error("not_prepared", message, 500))
            return
        prepared, request.prepared = request.prepared, None
        request.is_running = True
        self._thread.add(request_id, prepared, request.num_choices)

    def _cancel(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return  # answered already
        if request.is_running:
            self._thread.abort(request_id)
        else:
            self.end(request_id, cancelled())

    def tick(self) -> None:
        """End what was prepared and not started in time."""
        now = time.monotonic()
        expired = [
            request_id
            for request_id, request in self._requests.items()
            if request.prepared is not None and request.deadline <= now
        ]
        for request_id in expired:
            message = "The request was not started in time."
            self.end(request_id, server_error("start_timeout", message, 503))

    def drain(self) -> None:
        super().drain()
        latest = time.monotonic() + DRAINING_START_SECONDS
        for request in self._requests.values():
            request.deadline = min(request.deadline, latest)

    # --- while it runs: `engine_thread.Listener` -----------------------------------------

    def deliver(self, outputs: list[SequenceOutput], finished: list[str]) -> None:
        self._send_step(outputs)
        for request_id in finished:
            self._forget(request_id)
        if self._is_paused:
            self._num_held_credits += 1
        else:
            self._thread.give_credit()

    def _send_step(self, outputs: list[SequenceOutput]) -> None:
        """In one frame, or in several when many choices echo a long prompt. An output that fits
        none ends its request."""
        # Of one that has failed on this side, the engine still tells until it is aborted.
        outputs = [output for output in outputs if output.request_id in self._requests]
        if not outputs:
            return
        try:
            self.connection.send(Step(outputs=outputs))
        except ValueError:
            if len(outputs) == 1:
                self._thread.abort(outputs[0].request_id)
                self.end(outputs[0].request_id, output_too_large())
                return
            half = len(outputs) // 2
            self._send_step(outputs[:half])
            self._send_step(outputs[half:])

    def end(self, request_id: str, error: WireError) -> None:
        if self._forget(request_id):
            self.connection.send(Failed(request_id=request_id, error=error))

    def _forget(self, request_id: str) -> bool:
        """The request is answered; False if it was before."""
        self._memory.release(request_id)
        return self._requests.pop(request_id, None) is not None

    def fail(self, error: WireError) -> None:
        self.connection.fail(error)

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        for _ in range(self._num_held_credits):
            self._thread.give_credit()
        self._num_held_credits = 0

    def stats(self) -> Stats:
        """The engine's, with what is not started counted as waiting and warming up left out."""
        now, before = self._thread.stats, self._before
        num_not_started = sum(not request.is_running for request in self._requests.values())
        return msgspec.structs.replace(
            now,
            num_waiting=now.num_waiting + num_not_started,
            prompt_tokens=now.prompt_tokens - before.prompt_tokens,
            cached_tokens=now.cached_tokens - before.cached_tokens,
            output_tokens=now.output_tokens - before.output_tokens,
            requests=now.requests - before.requests,
            runs=now.runs - before.runs,
            device_ns=now.device_ns - before.device_ns,
        )

    def close(self) -> None:
        self._requests.clear()
        self._thread.stop()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._compiles.close()
