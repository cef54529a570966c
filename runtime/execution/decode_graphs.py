"""Runs decode steps by replaying what was captured of them once, so that launching costs nothing.

Owns when a step is captured and replayed, and the memory that captured steps read. Does not own
the capturing itself (`cuda_graphs.py`), nor how a step is computed (`runner.py`).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from runtime.cache.transfer import pinned
from runtime.execution.attention import AttentionMetadata
from runtime.execution.runner import PackedBatch, Runner
from runtime.scheduling.plan import BlockMoves

log = logging.getLogger(__name__)

NO_SLOT = -1  # where padding stores its keys and values: nowhere
# A step replayed and the same step run may differ by this share of the largest logit; a step that
# held on to another step's inputs differs by about all of it.
TOLERANCE = 0.05


class CapturedGraph(Protocol):
    """Work that reads and writes the same memory each time."""

    @property
    def output(self) -> Tensor:
        """What the captured function returned; each replay of any graph may overwrite it."""
        ...

    def replay(self) -> None:
        """Do the work again with what the memory holds now, without waiting for it."""
        ...


class GraphCapture(Protocol):
    """A device's means to record the work that a function gives it."""

    def capture(self, run: Callable[[], Tensor]) -> CapturedGraph:
        """Calls `run` some times; raises whatever `run` does, and when it cannot be captured."""
        ...


class DecodeInputs:
    """The inputs of a decode step at fixed addresses: one row per sequence, the rest padding.

    Every size of step reads the first rows of the same tensors. Padding is token 0 at position 0
    of a sequence without a context, which stores nothing.
    """

    def __init__(
        self, max_sequences: int, max_context_tokens: int, block_size: int, device: torch.device
    ) -> None:
        self.max_blocks = -(-max_context_tokens // block_size)
        self._block_size = block_size
        self._max_context_tokens = max_context_tokens
        num_rows = -(-max_sequences // 16) * 16  # tensors begin at multiples of 64 bytes
        # Token ids, positions and slots: one transfer.
        self._tokens = torch.zeros(3, num_rows, dtype=torch.int64, device=device)
        self._context_lens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        tables_shape = max_sequences, self.max_blocks
        self._block_tables = torch.zeros(tables_shape, dtype=torch.int32, device=device)
        self._rows = torch.arange(num_rows, device=device)
        self._query_start = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self.clear()

    def clear(self) -> None:
        """Nothing but padding."""
        tokens = torch.zeros(self._tokens.shape, dtype=torch.int64)
        tokens[2] = NO_SLOT
        self._copy(self._tokens, tokens)
        self._context_lens.zero_()

    def fill(self, batch: PackedBatch) -> None:
        """Copy a batch of one token per sequence here. The device takes it when it gets there, so
        the processor does not wait for steps before."""
        num_sequences, width = batch.block_tables.shape
        tokens = torch.zeros(self._tokens.shape, dtype=torch.int64)
        tokens[2] = NO_SLOT
        for row, values in zip(
            tokens, (batch.token_ids, batch.positions, batch.slots), strict=True
        ):
            row[:num_sequences] = values
        context_lens = torch.zeros(self._context_lens.shape, dtype=torch.int32)
        context_lens[:num_sequences] = batch.context_lens
        self._copy(self._tokens, tokens)
        self._copy(self._context_lens, context_lens)
        # Only what is used: a long context's table is mostly empty. The rest is never read.
        self._copy(self._block_tables[:num_sequences, :width], batch.block_tables)

    def compute(self, runner: Runner, num_rows: int) -> Tensor:
        """The logits of the first `num_rows` rows. Depends on nothing but these tensors."""
        metadata = AttentionMetadata(
            query_start=self._query_start[: num_rows + 1],
            context_lens=self._context_lens[:num_rows],
            block_tables=self._block_tables[:num_rows],
            slots=self._tokens[2, :num_rows],
            block_size=self._block_size,
            max_query_len=1,
            max_context_len=self._max_context_tokens,
        )
        token_ids, positions = self._tokens[0, :num_rows], self._tokens[1, :num_rows]
        return runner.compute(token_ids, positions, self._rows[:num_rows], metadata)

    @staticmethod
    def _copy(target: Tensor, source: Tensor) -> None:
        target.copy_(pinned(source, target.device), non_blocking=True)


@dataclass(slots=True)
class _Captured:
    graph: CapturedGraph
    is_checked: bool = False


class DecodeGraphs:
    """An `engine.StepRunner` that replays steps in which every sequence decodes one token.

    Such a step is padded to the next of a few sizes. A size is captured when it is used for the
    second time, together with all that were used before, largest first, for the smaller ones then
    find the larger one's memory. The first replay of each is held against the same step run
    anew. Everything else, and everything after a failure, is run as it would be without this.
    """

    def __init__(
        self, runner: Runner, capture: GraphCapture, *, max_sequences: int, max_context_tokens: int
    ) -> None:
        """No sequence in a step is longer than `max_context_tokens`."""
        assert runner.backend.takes_padding, f"{runner.backend.name} takes no padding"
        pool = runner.pool
        most = min(max_context_tokens, pool.num_blocks * pool.block_size)
        self._runner = runner
        self._capture = capture
        self._inputs = DecodeInputs(max_sequences, most, pool.block_size, pool.device)
        self._sizes = graph_sizes(max_sequences)
        self._used: set[int] = set()  # and not captured
        self._captured: dict[int, _Captured] = {}
        self._is_given_up = False

    @property
    def captured_sizes(self) -> list[int]:
        """Sequences of the steps that can be replayed."""
        return sorted(self._captured)

    def move(self, moves: BlockMoves) -> None:
        """See `Runner.move`."""
        self._runner.move(moves)

    @torch.inference_mode()
    def run(self, batch: PackedBatch) -> Tensor:
        """See `Runner.run`; the logits are overwritten by the next call."""
        size = self._size_of(batch)
        if size is None or not self._is_ready(size):
            return self._runner.run(batch)
        captured = self._captured[size]
        num_sequences = len(batch.context_lens)
        self._inputs.fill(batch)
        captured.graph.replay()
        if captured.is_checked:
            return captured.graph.output[:num_sequences]
        return self._checked(captured, size)[:num_sequences]

    def _size_of(self, batch: PackedBatch) -> int | None:
        """The size of graph that a batch needs; None if none can compute it."""
        num_sequences, num_blocks = batch.block_tables.shape
        is_decode = len(batch.token_ids) == len(batch.sample_indices) == num_sequences
        if not is_decode or num_blocks > self._inputs.max_blocks:
            return None
        return next((size for size in self._sizes if size >= num_sequences), None)

    def _is_ready(self, size: int) -> bool:
        """Whether a graph of `size` can be replayed, after capturing it if it is due."""
        if size not in self._captured and not self._is_given_up:
            if size in self._used:
                self._capture_used()
            else:
                self._used.add(size)
        return size in self._captured

    def _capture_used(self) -> None:
        self._inputs.clear()  # capturing must not touch a block
        for size in sorted(self._used, reverse=True):
            try:
                graph = self._capture.capture(
                    lambda size=size: self._inputs.compute(self._runner, size)
                )
            except Exception:  # a model may do anything; a lost device shows in the next run
                log.exception("decode steps of %d cannot be captured: they run uncaptured", size)
                self._is_given_up = True
                return
            self._captured[size] = _Captured(graph)
            self._used.remove(size)

    def _checked(self, captured: _Captured, size: int) -> Tensor:
        """The logits of the step that was just replayed, run anew; the graph is used from now on
        if its own are the same."""
        replayed = captured.graph.output.clone()
        expected = self._inputs.compute(self._runner, size)
        if is_close(replayed, expected):
            captured.is_checked = True
        else:
            log.error("replayed decode steps of %d differ: all run uncaptured from now on", size)
            self._is_given_up = True
            self._captured.clear()
        return expected


def graph_sizes(max_sequences: int) -> list[int]:
    """The powers of two below `max_sequences`, and itself."""
    powers = [1 << exponent for exponent in range(max_sequences.bit_length())]
    return [size for size in powers if size < max_sequences] + [max_sequences]


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether logits are equal but for rounding; what is not finite must be so in both."""
    is_finite = expected.isfinite()
    if not bool((is_finite == found.isfinite()).all()):
        return False
    zero = torch.zeros((), device=expected.device)
    largest = torch.where(is_finite, expected, zero).abs().max()
    difference = torch.where(is_finite, found - expected, zero).abs().max()
    return bool(difference <= TOLERANCE * largest)


def with_decode_graphs(
    runner: Runner, max_sequences: int, max_context_tokens: int
) -> Runner | DecodeGraphs:
    """`runner`, replaying decode steps where it runs on CUDA and its model allows it."""
    is_capturable = getattr(runner.model, "is_capturable", True)
    if runner.pool.device.type != "cuda" or not is_capturable:
        return runner
    from runtime.execution.cuda_graphs import CudaGraphCapture

    capture = CudaGraphCapture(runner.pool.device)
    return DecodeGraphs(
        runner, capture, max_sequences=max_sequences, max_context_tokens=max_context_tokens
    )
