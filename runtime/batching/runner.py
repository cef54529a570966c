"""Runs rows of several requests together, and finds whose fault it is when that fails.

Owns the calls of the program, on whatever thread it is told to, and what each part pays for them.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import torch

from runtime.batching.joining import Array, Rows, check_outputs, join, part_outputs, row_size
from runtime.batching.tensors import PredictFailure
from runtime.protocol import Schema

logger = logging.getLogger(__name__)

Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class Counters(msgspec.Struct, kw_only=True):
    """Since start. `requests`, `rows` and `queue_ns` count those that were answered with outputs;
    `runs_by_rows` has runs by their rows, rounded up to a power of two."""

    requests: int = 0
    rows: int = 0
    runs: int = 0
    device_ns: int = 0
    queue_ns: int = 0
    runs_by_rows: Counter[int] = msgspec.field(default_factory=Counter)


class Part(msgspec.Struct, frozen=True):
    """What a run gave one of those that took part in it."""

    outputs: list[Array]
    device_ns: int
    batch_rows: int


class RunResult(msgspec.Struct, frozen=True):
    """One of `parts` for each that took part, in order. `run_ns` is all the time it took;
    `failed_values` those of the rows of runs that failed."""

    parts: list[Part | PredictFailure]
    run_ns: int
    failed_values: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether it was one run, and went well."""
        return not any(isinstance(part, PredictFailure) for part in self.parts)


class Runner:
    """`run` takes and returns tensors in the schema's order, and may raise whatever it likes."""

    def __init__(self, run: Run, schema: Schema, counters: Counters) -> None:
        self._run = run
        self._schema = schema
        self._counters = counters
        self._failed_values = 0  # of the present rows

    def run(self, rows: Sequence[Rows]) -> RunResult:
        """Never raises. A run that fails is halved, and so on, so that only the guilty fail. What
        the others' runs took then is shared among them as if it had been one."""
        started_ns = time.perf_counter_ns()
        self._failed_values = 0
        parts: list[Part | PredictFailure]
        try:
            parts = self._shared(self._parts(rows), rows)
        except BaseException:  # whatever it is, nobody may wait for ever
            logger.exception("the answers of %d requests were lost", len(rows))
            parts = [_lost_run() for _ in rows]
        run_ns = time.perf_counter_ns() - started_ns
        return RunResult(parts, run_ns, self._failed_values)

    def _shared(
        self, parts: list[Part | PredictFailure], rows: Sequence[Rows]
    ) -> list[Part | PredictFailure]:
        if not self._failed_values:  # one run, whose shares are right
            return parts
        pairs = zip(parts, rows, strict=True)
        done = [(part, each) for part, each in pairs if isinstance(part, Part)]
        total_ns = sum(part.device_ns for part, _ in done)
        found = iter(shares(total_ns, [self._size(each) for _, each in done]))
        return [
            msgspec.structs.replace(part, device_ns=next(found)) if isinstance(part, Part) else part
            for part in parts
        ]

    def _size(self, rows: Rows) -> int:
        return rows.num_rows * row_size(rows.inputs, self._schema)

    def _parts(self, rows: Sequence[Rows]) -> list[Part | PredictFailure]:
        counted_ns = self._counters.device_ns
        try:
            return [*self._together(rows)]
        except Exception as error:  # whatever a stranger's graph raises belongs to its request
            logger.warning("a run of %d requests failed", len(rows), exc_info=True)
            if isinstance(error, torch.AcceleratorError):
                return [lost_device() for _ in rows]
            if len(rows) == 1:  # nobody pays for the runs that it spoiled before
                return [model_failure(error, self._counters.device_ns - counted_ns)]
        middle = len(rows) // 2
        first = self._parts(rows[:middle])
        if any(map(is_lost_device, first)):
            return [*first, *(lost_device() for _ in rows[middle:])]
        return first + self._parts(rows[middle:])

    def _timed(self, inputs: list[torch.Tensor], num_rows: int) -> list[torch.Tensor]:
        """Counts the run whether or not it fails."""
        started_ns = time.perf_counter_ns()
        try:
            return self._run(inputs)
        finally:
            self._counters.runs += 1
            self._counters.runs_by_rows[1 << (num_rows - 1).bit_length()] += 1
            self._counters.device_ns += time.perf_counter_ns() - started_ns

    def _together(self, rows: Sequence[Rows]) -> list[Part]:
        inputs = join(rows, self._schema)
        num_rows = sum(each.num_rows for each in rows)
        sizes = [self._size(each) for each in rows]
        counted_ns = self._counters.device_ns
        try:
            outputs = self._timed(inputs, num_rows)
            device_ns = self._counters.device_ns - counted_ns
            arrays = check_outputs(outputs, num_rows, self._schema)
        except BaseException:
            self._failed_values += sum(sizes)
            raise
        parts = []
        start = 0
        for each, share in zip(rows, shares(device_ns, sizes), strict=True):
            parts.append(Part(part_outputs(arrays, start, each, self._schema), share, num_rows))
            start += each.num_rows
        return parts


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in proportion to `weights`, to which the shares add up exactly."""
    whole = sum(weights)
    found = []
    before = given = 0
    for weight in weights:
        before += weight
        found.append(total * before // whole - given)
        given += found[-1]
    return found


# --- failures ---------------------------------------------------------------------------


def model_failure(error: Exception, device_ns: int) -> PredictFailure:
    """The program raised `error` on a request's own rows, which ran for so long."""
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
    failure = PredictFailure(
        "model_failed", f"The model failed on this input ({reason}).", status=422
    )
    failure.device_ns = device_ns
    return failure


def is_model_failure(result: object) -> bool:
    """Whether it is a failure of `model_failure`."""
    return isinstance(result, PredictFailure) and result.error.code == "model_failed"


def _lost_run() -> PredictFailure:
    message = "The model's process failed on this request. Try again."
    return PredictFailure("internal_error", message, status=500)


def is_lost_device(result: object) -> bool:
    """Whether it is a failure of `lost_device`."""
    return isinstance(result, PredictFailure) and result.error.code == "device_lost"


def lost_device() -> PredictFailure:
    """What everyone is told once the device is unusable."""
    return PredictFailure(
        "device_lost", "The model's device failed; it is being restarted. Try again.", status=503
    )
