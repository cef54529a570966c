"""Runs a tensor program's requests, several to a run where its schema allows.

An asyncio front and one executor thread, so that runs never overlap. Which requests share a
run is `queue.py`'s decision; wire forms and their checks are `tensors.py`'s.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from runtime.batching.queue import BatchQueue, Pending
from runtime.batching.tensors import PredictFailure, decode_inputs, encode_outputs
from runtime.protocol import Schema, Tensor

logger = logging.getLogger(__name__)

Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """`device_ns` is the request's share, by rows, of the runs it was part of; `batch_rows` the
    rows of the fullest of them; `queue_ns` its time in the queue."""

    outputs: list[Tensor]
    device_ns: int
    batch_rows: int
    queue_ns: int


class Counters(msgspec.Struct, kw_only=True):
    """Since start. `requests` and `rows` count those that were answered with outputs."""

    requests: int = 0
    rows: int = 0
    runs: int = 0
    device_ns: int = 0


class _Piece(msgspec.Struct, kw_only=True):
    """At most one run's worth of a request's rows, and who waits for it."""

    inputs: list[torch.Tensor]
    answer: "asyncio.Future[_Part]"
    on_run: Callable[[], None]


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one run gave one piece."""

    outputs: list[torch.Tensor]
    device_ns: int
    batch_rows: int
    queue_ns: int


class Batcher:
    """Dynamic batching. `run` takes and returns tensors in the schema's order, and may raise:
    then the run's requests are run one by one, so that only the guilty one fails.

    A request of more than `max_batch_rows` rows runs in pieces, between which others get their
    turn. `on_lost_device` is called once when the device is unusable from here on.
    """

    def __init__(
        self,
        run: Run,
        schema: Schema,
        max_batch_rows: int = 64,
        max_wait_ms: float = 2.0,
        *,
        max_waiting: int = 1024,
        on_lost_device: Callable[[], None] | None = None,
    ) -> None:
        self.schema = schema
        self.counters = Counters()
        self.max_batch_rows = min([max_batch_rows, *_batch_limits(schema)])
        self._run = run
        self._max_waiting = max_waiting
        self._on_lost_device = on_lost_device
        self._queue: BatchQueue[_Piece] = BatchQueue(self.max_batch_rows, int(max_wait_ms * 1e6))
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._running: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._refusal: PredictFailure | None = None  # what every later request is told
        self._num_requests = 0
        self._is_paused = False

    @property
    def num_waiting(self) -> int:
        """Pieces in the queue."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Requests taken but not answered, less those that wait."""
        return max(0, self._num_requests - len(self._queue))

    async def predict(
        self, tensors: Sequence[Tensor], on_run: Callable[[], None] = lambda: None
    ) -> Prediction:
        """Raises `PredictFailure` for wrong inputs, a full queue, or a program that fails on
        them. Cancelling it drops what has not started. `on_run` is called when a run of its rows
        begins."""
        if self._num_requests >= self._max_waiting:
            raise PredictFailure(
                "queue_full", "The model has too many requests waiting. Try again.", status=429
            )
        inputs = decode_inputs(tensors, self.schema)
        self._num_requests += 1
        try:
            parts = [await self._submit(piece, on_run) for piece in self._split(inputs)]
        finally:
            self._num_requests -= 1
        outputs = parts[0].outputs
        if len(parts) > 1:
            outputs = [torch.cat(rows) for rows in zip(*(p.outputs for p in parts), strict=True)]
        encoded = encode_outputs(outputs, self.schema)
        self.counters.requests += 1
        self.counters.rows += self._rows(inputs)
        return Prediction(
            outputs=encoded,
            device_ns=sum(part.device_ns for part in parts),
            batch_rows=max(part.batch_rows for part in parts),
            queue_ns=sum(part.queue_ns for part in parts),
        )

    def pause(self) -> None:
        """Start no run until `resume`: nobody takes the answers."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._wake()

    async def close(self) -> None:
        """Refuse what waits and end after the run in progress."""
        self._refuse_all(
            PredictFailure("stopping", "The model is stopping. Try again.", status=503)
        )
        if self._timer is not None:
            self._timer.cancel()
        if self._running is not None:
            await asyncio.wait([self._running])
        self._executor.shutdown(wait=False)

    # --- queueing -----------------------------------------------------------------------

    def _split(self, inputs: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        if not self.schema.is_batched:
            yield inputs
            return
        size = self.max_batch_rows
        for start in range(0, inputs[0].shape[0], size):
            yield [tensor[start : start + size] for tensor in inputs]

    def _rows(self, inputs: list[torch.Tensor]) -> int:
        return inputs[0].shape[0] if self.schema.is_batched else 1

    async def _submit(self, inputs: list[torch.Tensor], on_run: Callable[[], None]) -> _Part:
        if self._refusal is not None:
            raise self._refusal
        answer: asyncio.Future[_Part] = asyncio.get_running_loop().create_future()
        piece = _Piece(inputs=inputs, answer=answer, on_run=on_run)
        # Unbatched programs get a key that equals no other, hence a run each.
        key = tuple(t.shape[1:] for t in inputs) if self.schema.is_batched else object()
        rows = self._rows(inputs) if self.schema.is_batched else self.max_batch_rows
        pending = Pending(piece, key, rows, time.monotonic_ns())
        self._queue.add(pending, is_running=self._running is not None)
        self._wake()
        try:
            return await answer
        except asyncio.CancelledError:
            self._queue.remove(pending)
            raise

    def _wake(self) -> None:
        """Start the next run if nothing runs and the first request need not wait."""
        if self._running is not None or self._is_paused:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_ns = time.monotonic_ns()
        if batch := self._queue.take(now_ns):
            for pending in batch:
                pending.item.on_run()
            self._running = asyncio.create_task(self._execute(batch))
        elif (due_ns := self._queue.due_ns()) is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0, due_ns - now_ns) / 1e9, self._wake)

    # --- running ------------------------------------------------------------------------

    async def _execute(self, batch: list[Pending[_Piece]]) -> None:
        loop = asyncio.get_running_loop()
        started_ns = time.monotonic_ns()
        pieces = [pending.item.inputs for pending in batch]
        results: list[_Part | PredictFailure] = [_lost_run() for _ in batch]
        try:
            results = await loop.run_in_executor(self._executor, self._run_pieces, pieces)
        except asyncio.CancelledError:  # the loop is closing
            raise
        except BaseException:  # whatever it is, nobody may wait for ever
            logger.exception("the answers of %d requests were lost", len(batch))
        finally:
            self._running = None
            self._answer(batch, results, started_ns)
        if any(_is_lost_device(result) for result in results):
            self._refuse_all(_lost_device())
            if self._on_lost_device is not None:
                self._on_lost_device()
        self._wake()

    def _answer(
        self,
        batch: list[Pending[_Piece]],
        results: list[_Part | PredictFailure],
        started_ns: int,
    ) -> None:
        for pending, result in zip(batch, results, strict=True):
            if isinstance(result, _Part):
                queue_ns = started_ns - pending.arrived_ns
                result = msgspec.structs.replace(result, queue_ns=queue_ns)
            _settle(pending.item.answer, result)

    def _run_pieces(self, pieces: list[list[torch.Tensor]]) -> list[_Part | PredictFailure]:
        """On the executor's thread. One result per piece, in order."""
        rows = [self._rows(piece) for piece in pieces]
        try:
            return self._run_together(pieces, rows)
        except Exception as error:  # whatever a stranger's graph raises belongs to its request
            logger.warning("a run of %d requests failed", len(pieces), exc_info=True)
            if isinstance(error, torch.AcceleratorError):
                return [_lost_device() for _ in pieces]
            if len(pieces) == 1:
                return [_model_failure(error)]
        return [result for piece in pieces for result in self._run_pieces([piece])]

    def _run_together(
        self, pieces: list[list[torch.Tensor]], rows: list[int]
    ) -> list[_Part | PredictFailure]:
        columns = zip(*pieces, strict=True)
        inputs = pieces[0] if len(pieces) == 1 else [torch.cat(column) for column in columns]
        started_ns = time.perf_counter_ns()
        outputs = self._run(inputs)
        device_ns = time.perf_counter_ns() - started_ns
        self.counters.runs += 1
        self.counters.device_ns += device_ns
        total = sum(rows)
        if self.schema.is_batched and any(output.shape[0] != total for output in outputs):
            raise RuntimeError(f"the program returned other than {total} rows for {total}")
        split = [output.split(rows) if len(pieces) > 1 else (output,) for output in outputs]
        return [
            _Part(
                outputs=[parts[index] for parts in split],
                device_ns=device_ns * rows[index] // total,
                batch_rows=total,
                queue_ns=0,
            )
            for index in range(len(pieces))
        ]

    def _refuse_all(self, refusal: PredictFailure) -> None:
        self._refusal = refusal
        for pending in self._queue.clear():
            _settle(pending.item.answer, refusal)


def _batch_limits(schema: Schema) -> list[int]:
    """The greatest batch each input allows, where it has one."""
    if not schema.is_batched:
        return []
    limits = [spec.max_shape[0] for spec in schema.inputs if spec.max_shape]
    return [limit for limit in limits if limit is not None]


def _settle(answer: "asyncio.Future[_Part]", result: _Part | PredictFailure) -> None:
    with contextlib.suppress(asyncio.InvalidStateError):  # its request was cancelled meanwhile
        if isinstance(result, _Part):
            answer.set_result(result)
        else:
            answer.set_exception(result)


def _model_failure(error: Exception) -> PredictFailure:
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
    return PredictFailure("model_failed", f"The model failed on this input ({reason}).", status=422)


def _lost_run() -> PredictFailure:
    message = "The model's process failed on this request. Try again."
    return PredictFailure("internal_error", message, status=500)


def _is_lost_device(result: object) -> bool:
    return isinstance(result, PredictFailure) and result.error.code == "device_lost"


def _lost_device() -> PredictFailure:
    return PredictFailure(
        "device_lost", "The model's device failed; it is being restarted. Try again.", status=503
    )
