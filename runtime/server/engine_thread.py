"""The one thread that runs a decoder engine.

Owns when a step runs, how far it may run ahead of the peer, and what a failed step means for the
requests in it. Does not own requests that have not started: see `decoder.py`.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from runtime.protocol import Generate, SequenceOutput, Stats, WireError
from runtime.server.connection import server_error, wire_error

logger = logging.getLogger(__name__)

MAX_UNSENT_STEPS = 16
MAX_FAILED_STEPS = 3  # in a row; then the process is given up
INTEGRITY_SECONDS = 10.0  # between checks, which are made when there is nothing else to do


class PreparedRequest(Protocol):
    """What the server needs to know of `DecoderEngine.prepare`'s result."""

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...


class Engine(Protocol):
    """The part of `DecoderEngine` that is used here. `prepare` and `to_compile` are called from
    any thread; all else from the engine's."""

    @property
    def has_work(self) -> bool: ...
    def prepare(self, generate: Generate) -> Any: ...
    def to_compile(self, generate: Generate) -> bytes | None: ...
    def add(self, prepared: Any) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[SequenceOutput]: ...
    def stats(self) -> Stats: ...
    def check_integrity(self) -> None: ...


class Listener(Protocol):
    """Who hears what the engine's thread has to say, on the loop's thread."""

    def deliver(self, outputs: list[SequenceOutput], finished: list[str]) -> None:
        """A step's outputs and the requests that they end. Gives a credit back once it is safe to
        produce more."""

    def end(self, request_id: str, error: WireError) -> None:
        """The request failed."""

    def fail(self, error: WireError) -> None:
        """The engine cannot go on; its thread has ended."""


class EngineThread:
    """Runs an engine's steps while there is work, and sleeps otherwise.

    At most `MAX_UNSENT_STEPS` steps are ahead of what the peer has taken: each takes a credit,
    which comes back once its outputs are on their way.
    """

    def __init__(self, engine: Engine, listener: Listener) -> None:
        self.stats = engine.stats()
        self._engine = engine
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._credits = threading.Semaphore(MAX_UNSENT_STEPS)
        self._is_stopped = False
        self._num_unfinished: dict[str, int] = {}  # choices, per request in the engine
        self._num_failed_steps = 0
        self._checked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- called on the loop's thread ----------------------------------------------------

    def add(self, request_id: str, prepared: PreparedRequest, num_choices: int) -> None:
        self._commands.put(lambda: self._add(request_id, prepared, num_choices))

    def abort(self, request_id: str) -> None:
        self._commands.put(lambda: self._engine.abort(request_id))

    def give_credit(self) -> None:
        self._credits.release()

    def stop(self) -> None:
        """Stop after the step in progress."""
        self._is_stopped = True
        self._credits.release()
        self._commands.put(None)

    # --- on its own thread --------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work:
                    self._step()
                self.stats = self._engine.stats()
                self._check_when_idle()
        except BaseException:  # whatever it is, the peer must hear of it
            logger.exception("the engine failed")
            message = "The model's engine failed and is being restarted. Try again."
            self._post(self._listener.fail, server_error("engine_failed", message, 503))

    def _obey(self) -> bool:
        """Carry out what was asked; wait for it when there is no work. False ends the thread."""
        is_idle = not self._engine.has_work
        while not self._is_stopped:
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                return True
            if command is not None:
                command()
            is_idle = False
        return False

    def _check_when_idle(self) -> None:
        """A block that got lost is found here, not when the cache has run empty."""
        now = time.monotonic()
        if not self._engine.has_work and now - self._checked >= INTEGRITY_SECONDS:
            self._checked = now
            self._engine.check_integrity()

    def _add(self, request_id: str, prepared: PreparedRequest, num_choices: int) -> None:
        try:
            self._engine.add(prepared)
        except Exception as error:  # noqa: BLE001 - it must not stop the others
            self._post(self._listener.end, request_id, wire_error(error))
        else:
            self._num_unfinished[request_id] = num_choices

    def _step(self) -> None:
        self._credits.acquire()
        if self._is_stopped:
            return
        try:
            outputs = self._engine.step()
        except Exception as error:  # noqa: BLE001 - a model may raise anything
            self._credits.release()
            self._recover(error)
            return
        self._num_failed_steps = 0
        # A request that failed is answered already, whatever the engine still says of it.
        outputs = [o for o in outputs if o.request_id in self._num_unfinished]
        finished = [o.request_id for o in outputs if o.finish_reason and self._is_last(o)]
        if outputs:
            self._post(self._listener.deliver, outputs, finished)
        else:
            self._credits.release()

    def _is_last(self, output: SequenceOutput) -> bool:
        self._num_unfinished[output.request_id] -= 1
        if self._num_unfinished[output.request_id]:
            return False
        del self._num_unfinished[output.request_id]
        return True

    def _recover(self, error: Exception) -> None:
        """Fail every request in the engine, and go on with it if it can."""
        logger.error("a step failed", exc_info=error)
        self._num_failed_steps += 1
        is_lost = isinstance(error, torch.AcceleratorError)
        if is_lost or self._num_failed_steps >= MAX_FAILED_STEPS:
            raise error
        failure = server_error("step_failed", "The model failed while it generated.", 500)
        for request_id in self._num_unfinished:
            self._engine.abort(request_id)
            self._post(self._listener.end, request_id, failure)
        self._num_unfinished.clear()

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(callback, *arguments)
