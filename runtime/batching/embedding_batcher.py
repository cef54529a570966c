"""Runs the texts of requests for embeddings, similar lengths together, on one executor thread.

Which texts share a run is `length_queue.py`'s decision.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from runtime.batching.length_queue import LengthQueue, Text
from runtime.protocol import WireError

logger = logging.getLogger(__name__)

Run = Callable[[list[list[int]]], torch.Tensor]  # token ids to float32 [texts, dimensions]


class EmbeddingFailure(Exception):
    """Why a request has no vectors."""

    def __init__(self, code: str, message: str, *, status: int = 500) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.error = WireError(type=kind, code=code, message=message, param=None, status=status)


class Vectors(msgspec.Struct, frozen=True, kw_only=True):
    """`data` is float32, little-endian, one row per text; empty when the request was cancelled,
    and then `num_tokens` counts only texts that ran. `device_ns` is its share by tokens."""

    data: bytes
    num_tokens: list[int]
    device_ns: int


class Counters(msgspec.Struct, kw_only=True):
    """Since start. `texts` and `tokens` count those that ran."""

    requests: int = 0
    texts: int = 0
    tokens: int = 0
    runs: int = 0
    device_ns: int = 0


class _Request:
    """A request whose texts wait or run."""

    def __init__(self, texts: list[list[int]], answer: "asyncio.Future[Vectors]") -> None:
        self.answer = answer
        self.num_left = len(texts)  # that wait or run
        self.num_running = 0
        self.rows: list[torch.Tensor | None] = [None] * len(texts)
        self.num_tokens = [0] * len(texts)
        self.device_ns = 0
        self.is_cancelled = False


class EmbeddingBatcher:
    """`run` may raise: then halves of its texts are run by themselves, and so on, so that only the
    guilty one's request fails. `on_lost_device` is called once when the device is unusable from
    here on."""

    def __init__(
        self,
        run: Run,
        queue: LengthQueue,
        *,
        on_lost_device: Callable[[], None] = lambda: None,
    ) -> None:
        self.counters = Counters()
        self._run = run
        self._queue = queue
        self._on_lost_device = on_lost_device
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="embedder")
        self._requests: dict[str, _Request] = {}
        self._running: asyncio.Task[None] | None = None
        self._is_paused = False
        self._is_closed = False

    @property
    def num_running(self) -> int:
        """Requests of whose texts some run at the moment."""
        return sum(request.num_running > 0 for request in self._requests.values())

    @property
    def num_waiting(self) -> int:
        """Requests of whose texts none run at the moment."""
        return len(self._requests) - self.num_running

    def submit(
        self, request_id: str, texts: list[list[int]], key: str
    ) -> "asyncio.Future[Vectors]":
        """The vectors of one request; `key` is whom its queueing is fair to. What is returned
        raises `EmbeddingFailure`."""
        answer: asyncio.Future[Vectors] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._requests.pop(request_id))
        self._requests[request_id] = _Request(texts, answer)
        self._queue.add(key, request_id, texts)
        self._wake()
        return answer

    def cancel(self, request_id: str) -> None:
        """Runs none of the request's texts that still wait. It ends once those that run are done,
        as cancelled if nothing ran at all."""
        request = self._requests.get(request_id)
        if request is None or request.is_cancelled:
            return
        request.is_cancelled = True
        self._queue.remove(request_id)
        self._end_cancelled(request)

    def pause(self) -> None:
        """Start no run until `resume`: nobody takes the answers."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._wake()

    def close(self) -> None:
        """Start no more runs; whoever waits is cancelled by its own task."""
        self._is_closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    # --- running ------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._running is not None or self._is_paused or self._is_closed:
            return
        if batch := self._queue.take():
            for text in batch:
                self._requests[text.request_id].num_running += 1
            self._running = asyncio.create_task(self._execute(batch))

    async def _execute(self, batch: list[Text]) -> None:
        loop = asyncio.get_running_loop()
        results: list[torch.Tensor | EmbeddingFailure] = [_lost_run() for _ in batch]
        device_ns = 0
        try:
            results, device_ns = await loop.run_in_executor(self._executor, self._results, batch)
        except asyncio.CancelledError:  # the loop is closing
            raise
        except BaseException:  # whatever it is, nobody may wait for ever
            logger.exception("the vectors of %d texts were lost", len(batch))
        self._running = None
        self._settle(batch, results, device_ns)
        if any(_is_lost_device(result) for result in results):
            self._is_closed = True
            for request_id, request in self._requests.items():
                self._queue.remove(request_id)
                _fail(request, _lost_device())
            self._on_lost_device()
        self._wake()

    def _results(self, batch: list[Text]) -> tuple[list[torch.Tensor | EmbeddingFailure], int]:
        """On the executor's thread: a vector or a failure per text, and the time it took."""
        started_ns = time.perf_counter_ns()
        try:
            rows = list(self._run([text.token_ids for text in batch]))
            results: list[torch.Tensor | EmbeddingFailure] = [
                row if bool(row.isfinite().all()) else _not_finite(text)
                for row, text in zip(rows, batch, strict=True)
            ]
        except Exception as error:  # whatever a stranger's model raises belongs to its text
            logger.warning("a run of %d texts failed", len(batch), exc_info=True)
            if isinstance(error, torch.AcceleratorError):
                results = [_lost_device() for _ in batch]
            elif len(batch) == 1:
                results = [_model_failure(batch[0], error)]
            else:
                middle = len(batch) // 2
                results = self._results(batch[:middle])[0] + self._results(batch[middle:])[0]
        self.counters.runs += 1
        return results, time.perf_counter_ns() - started_ns

    def _settle(
        self, batch: list[Text], results: list[torch.Tensor | EmbeddingFailure], device_ns: int
    ) -> None:
        total = sum(text.num_tokens for text in batch)
        self.counters.device_ns += device_ns
        for text, result in zip(batch, results, strict=True):
            request = self._requests.get(text.request_id)
            self.counters.texts += 1
            self.counters.tokens += text.num_tokens
            if request is None:  # it failed meanwhile
                continue
            request.num_running -= 1
            request.num_left -= 1
            request.num_tokens[text.index] = text.num_tokens
            request.device_ns += max(1, device_ns * text.num_tokens // total)
            if isinstance(result, EmbeddingFailure):
                self._queue.remove(text.request_id)
                _fail(request, result)
            else:
                request.rows[text.index] = result
                self._end(request)

    def _end(self, request: _Request) -> None:
        """Answers, if nothing of the request waits or runs any more."""
        if request.is_cancelled:
            self._end_cancelled(request)
        elif not request.num_left and not request.answer.done():
            rows = [row for row in request.rows if row is not None]
            data = torch.stack(rows).numpy().astype("<f4", copy=False).tobytes()
            self.counters.requests += 1
            request.answer.set_result(
                Vectors(data=data, num_tokens=request.num_tokens, device_ns=request.device_ns)
            )

    def _end_cancelled(self, request: _Request) -> None:
        if request.num_running or request.answer.done():
            return
        if not request.device_ns:
            _fail(request, EmbeddingFailure("cancelled", "The request was cancelled.", status=499))
            return
        request.answer.set_result(
            Vectors(data=b"", num_tokens=request.num_tokens, device_ns=request.device_ns)
        )


def _fail(request: _Request, failure: EmbeddingFailure) -> None:
    if not request.answer.done():
        request.answer.set_exception(failure)


def _model_failure(text: Text, error: Exception) -> EmbeddingFailure:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    message = f"The model failed on input[{text.index}] ({reason})."
    return EmbeddingFailure("model_failed", message, status=422)


def _not_finite(text: Text) -> EmbeddingFailure:
    message = f"The model gave NaN or infinity for input[{text.index}]."
    return EmbeddingFailure("not_finite", message, status=422)


def _lost_run() -> EmbeddingFailure:
    return EmbeddingFailure(
        "internal_error", "The model's process failed on this request. Try again."
    )


def _is_lost_device(result: object) -> bool:
    return isinstance(result, EmbeddingFailure) and result.error.code == "device_lost"


def _lost_device() -> EmbeddingFailure:
    message = "The model's device failed; it is being restarted. Try again."
    return EmbeddingFailure("device_lost", message, status=503)
