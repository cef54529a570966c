"""Runs a tensor program's requests, several to a run where its schema allows.

An asyncio front and one thread, so that runs never overlap. Which rows share a run, and when, is
`planner.py`'s decision; wire forms are `tensors.py`'s and `joining.py`'s.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from runtime.batching.fair_queue import Pending, Slice
from runtime.batching.joining import Array, Rows, encode, row_size, run_group
from runtime.batching.planner import Planner
from runtime.batching.runner import (
    Counters,
    Part,
    Run,
    Runner,
    RunResult,
    is_lost_device,
    is_model_failure,
    lost_device,
    model_failure,
)
from runtime.batching.tensors import (
    InputChecker,
    PredictFailure,
    check_output_bytes,
    least_output_bytes,
)
from runtime.protocol import Schema, Tensor


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """`device_ns` is the request's share, by the values of its rows, of the runs it was part of;
    `batch_rows` the rows of the fullest of them; `queue_ns` its time outside of them."""

    outputs: list[Tensor]
    device_ns: int
    batch_rows: int
    queue_ns: int


OnEnd = Callable[[Prediction | PredictFailure], None]


class Request:
    """One that has not ended."""

    __slots__ = (
        *("batch_rows", "came_ns", "device_ns", "inputs", "is_begun", "num_left", "num_rows"),
        *("on_end", "parts", "pending", "run_ns"),
    )

    def __init__(self, inputs: list[Tensor], num_rows: int, on_end: OnEnd) -> None:
        self.inputs = inputs
        self.num_rows = self.num_left = num_rows
        self.on_end: OnEnd | None = on_end  # None once it has ended
        self.is_begun = False
        self.came_ns = time.monotonic_ns()
        self.run_ns = 0
        self.device_ns = 0
        self.batch_rows = 0
        self.parts: list[list[Array]] = []
        self.pending: Pending[Request]


class Batcher:
    """`run` takes and returns tensors in the schema's order, and may raise: then halves of the
    run are run by themselves, and so on, so that only the guilty request fails.

    A request of more rows than a run takes runs in turns with others. `on_lost_device` is called
    once when the device is unusable from here on. `measured` are milliseconds of runs by rows.
    """

    def __init__(
        self,
        run: Run,
        schema: Schema,
        max_batch_rows: int = 64,
        latency_target_ms: float = 100.0,
        *,
        measured: Mapping[int, float] | None = None,
        on_lost_device: Callable[[], None] = lambda: None,
    ) -> None:
        self.counters = Counters()
        self.max_batch_rows = min([max_batch_rows, *_batch_limits(schema)])
        self._runner = Runner(run, schema, self.counters)
        self._schema = schema
        self._checker = InputChecker(schema)
        self._on_lost_device = on_lost_device
        self._planner: Planner[Request] = Planner(self.max_batch_rows, latency_target_ms, measured)
        self._running: list[Slice[Request]] = []
        self._refusal: PredictFailure | None = None  # what every later request is told
        self._is_paused = False
        self._began_ms = 0.0  # the run under way
        self._due_ms: float | None = None  # when the thread is to wake the loop
        # To the thread: a run, a time by its clock at which to wake the loop, or None to end.
        self._jobs: queue.SimpleQueue[list[Slice[Request]] | float | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def num_waiting(self) -> int:
        """Requests with rows in the queue."""
        return len(self._planner.queue)

    @property
    def num_running(self) -> int:
        """Requests with rows in the run under way."""
        return len({id(each.pending) for each in self._running})

    def drain_seconds(self) -> float:
        """How long what waits will take."""
        return self._planner.drain_ms() / 1e3

    def submit(self, tensors: Sequence[Tensor], caller: str, on_end: OnEnd) -> Request:
        """Queues a request; queueing is fair between callers. `on_end` is called later, once, on
        the loop. Raises `PredictFailure` for wrong inputs, and where the answer would not fit a
        frame."""
        if self._refusal is not None:
            raise self._refusal
        inputs = self._checker.check(tensors)
        num_rows = inputs[0].shape[0] if self._schema.is_batched else 1
        group, length = run_group(inputs, self._schema)
        check_output_bytes(least_output_bytes(self._schema, num_rows, length))
        request = Request(inputs, num_rows, on_end)
        request.pending = Pending(
            request, caller, group, num_rows, length=length, cost=row_size(inputs, self._schema)
        )
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            threading.Thread(target=self._work, name="batcher", daemon=True).start()
        self._planner.add(request.pending, _now_ms())
        self._wake()
        return request

    def cancel(self, request: Request) -> bool:
        """Drops a request of which nothing has run; it is not told. False for any other."""
        if request.is_begun or request.on_end is None:
            return False
        request.on_end = None
        return self._planner.queue.remove(request.pending)

    def pause(self) -> None:
        """Start no run until `resume`: nobody takes the answers."""
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._wake()

    def close(self) -> None:
        """Refuse what waits and what comes, and end after the run in progress."""
        message = "The model is stopping. Try again."
        self._refuse_all(PredictFailure("stopping", message, status=503))
        self._jobs.put(None)

    # --- on the loop's thread -----------------------------------------------------------

    def _wake(self) -> None:
        """Start the next run if nothing runs and waiting does not pay."""
        if self._running or self._is_paused or self._refusal is not None:
            return
        now_ms = _now_ms()
        if slices := self._planner.next(now_ms):
            for each in slices:
                each.pending.item.is_begun = True
            self._running = slices
            self._began_ms = now_ms
            self._due_ms = None
            self._jobs.put(slices)
        elif (due_ms := self._planner.due_ms) is not None and due_ms != self._due_ms:
            self._due_ms = due_ms
            self._jobs.put(due_ms / 1e3)  # the loop's own timers are good to a millisecond only

    def _finish(self, slices: list[Slice[Request]], result: RunResult) -> None:
        self._running = []
        for each, part in zip(slices, result.parts, strict=True):
            if isinstance(part, PredictFailure) and each.pending.rows:
                self._planner.queue.remove(each.pending)
        self._blame(slices, result)
        now_ms = _now_ms()
        # What the way to the thread and back takes is part of what a run costs.
        run_ms = now_ms - self._began_ms if result.is_clean else None
        size = max(each.pending.cost for each in slices)
        self._planner.ended(slices, now_ms, run_ms, size)
        if any(is_lost_device(part) for part in result.parts):
            self._refuse_all(lost_device())
            self._on_lost_device()
        self._wake()  # before the answers are made, which takes its time
        for each, part in zip(slices, result.parts, strict=True):
            self._settle(each, part, result.run_ns)

    def _blame(self, slices: list[Slice[Request]], result: RunResult) -> None:
        """Whose requests failed make up for what the runs that failed with them cost."""
        pairs = zip(slices, result.parts, strict=True)
        guilty = [each for each, part in pairs if is_model_failure(part)]
        for each in guilty:
            own = (each.stop - each.start) * each.pending.cost  # was counted as it was taken
            cost = max(0, result.failed_values // len(guilty) - own)
            self._planner.queue.blame(each.pending.caller, cost)

    def _settle(self, part_of: Slice[Request], part: Part | PredictFailure, run_ns: int) -> None:
        request = part_of.pending.item
        if request.on_end is None:  # it was refused while its rows ran
            return
        if isinstance(part, PredictFailure):
            part.device_ns += request.device_ns
            self._end(request, part)
            return
        request.num_left -= part_of.stop - part_of.start
        request.run_ns += run_ns
        request.device_ns += part.device_ns
        request.batch_rows = max(request.batch_rows, part.batch_rows)
        if request.num_left:  # what others got of the run is not kept for it
            request.parts.append([rows.copy() for rows in part.outputs])
        else:
            request.parts.append(part.outputs)
            self._end(request, self._prediction(request))

    def _prediction(self, request: Request) -> Prediction | PredictFailure:
        try:
            outputs = encode(request.parts, self._schema)
        except PredictFailure as failure:
            failure.device_ns = request.device_ns
            return failure
        except Exception as error:  # noqa: BLE001 - shapes, say, that no two runs agree on
            return model_failure(error, request.device_ns)
        queue_ns = max(0, time.monotonic_ns() - request.came_ns - request.run_ns)
        self.counters.requests += 1
        self.counters.rows += request.num_rows
        self.counters.queue_ns += queue_ns
        return Prediction(
            outputs=outputs,
            device_ns=request.device_ns,
            batch_rows=request.batch_rows,
            queue_ns=queue_ns,
        )

    def _end(self, request: Request, result: Prediction | PredictFailure) -> None:
        on_end, request.on_end = request.on_end, None
        request.parts.clear()
        if on_end is not None:
            on_end(result)

    def _refuse_all(self, refusal: PredictFailure) -> None:
        self._refusal = refusal
        for pending in self._planner.queue.clear():
            self._end(pending.item, refusal)

    # --- on the batcher's thread --------------------------------------------------------

    def _work(self) -> None:
        assert self._loop is not None, "started by the first request"
        timeout: float | None = None
        while True:
            try:
                job = self._jobs.get(timeout=timeout)
            except queue.Empty:
                timeout = None
                self._post(self._wake)
                continue
            if job is None:
                return
            if isinstance(job, list):
                timeout = None
                self._post(self._finish, job, self._run_slices(job))
            else:
                timeout = max(0.0, job - time.monotonic())

    def _post(self, action: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None, "started by the first request"
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(action, *arguments)

    def _run_slices(self, slices: list[Slice[Request]]) -> RunResult:
        parts = [
            Rows(each.pending.item.inputs, each.start, each.stop, each.pending.length)
            for each in slices
        ]
        return self._runner.run(parts)


def _now_ms() -> float:
    return time.monotonic() * 1e3


def _batch_limits(schema: Schema) -> list[int]:
    """The greatest batch each input allows, where it has one."""
    if not schema.is_batched:
        return []
    limits = [spec.max_shape[0] for spec in schema.inputs if spec.max_shape]
    return [limit for limit in limits if limit is not None]
