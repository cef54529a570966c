"""Runs chosen tokens through a `Runner` step by step, with every block placed at random.

The proof's and the tests' stand-in for a scheduler: it decides nothing on its own, so each way
of cutting, mixing and sharing sequences can be asked for by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from runtime.execution.runner import Runner
from runtime.scheduling.plan import BlockMoves


@dataclass(frozen=True)
class PackedTokens:
    """A packed batch (see `batch.StepBatch`) in which every token is sampled."""

    token_ids: Tensor
    positions: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slots: Tensor
    sample_indices: Tensor


@dataclass
class _Sequence:
    num_tokens: int = 0
    blocks: list[int] = field(default_factory=list)


class Replay:
    """Sequences by name, their blocks drawn at random from the runner's pool.

    Every free block is poisoned, and so is each block given back: whatever reads memory that is
    not its own turns its logits into NaN.
    """

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        self.runner = runner
        self._sequences: dict[str, _Sequence] = {}
        self._swapped: dict[str, _Sequence] = {}  # with blocks of host memory
        self._num_users = [0] * runner.pool.num_blocks
        shuffled = torch.Generator().manual_seed(seed)
        self._free: list[int] = torch.randperm(runner.pool.num_blocks, generator=shuffled).tolist()
        runner.pool.poison(self._free)
        num_host_blocks = runner.swap.num_blocks if runner.swap else 0
        self._free_host = torch.randperm(num_host_blocks, generator=shuffled).tolist()

    @property
    def block_size(self) -> int:
        """In tokens."""
        return self.runner.pool.block_size

    def step(
        self, work: Mapping[str, Sequence[int]], *, is_last_only: bool = False
    ) -> dict[str, Tensor]:
        """Append tokens to sequences in one step; a new name starts a new sequence.

        Returns float32 logits `[tokens, vocab]` of each sequence's new tokens, or with
        `is_last_only` of the last of them.
        """
        batch = self.pack(work)
        lengths = [len(tokens) for tokens in work.values()]
        if is_last_only:
            batch = replace(batch, sample_indices=batch.query_start[1:].long() - 1)
            lengths = [1] * len(work)
        logits = self.runner.run(batch)
        return dict(zip(work, logits.split(lengths), strict=True))

    def share(self, source: str, target: str, num_tokens: int) -> None:
        """Start `target` with the first `num_tokens` of `source`: full blocks are shared, the
        rest of them copied into a block of its own."""
        num_full, num_partial = divmod(num_tokens, self.block_size)
        blocks = self._sequences[source].blocks
        for block in blocks[:num_full]:
            self._num_users[block] += 1
        self._sequences[target] = sequence = _Sequence(num_tokens, blocks[:num_full])
        if num_partial:
            self._take_block(sequence)
            self.runner.move(BlockMoves(copies=[(blocks[num_full], sequence.blocks[-1])]))

    def swap_out(self, name: str) -> None:
        """Move a sequence's blocks to host memory; its device blocks are given back."""
        sequence = self._sequences[name]
        host = [self._free_host.pop() for _ in sequence.blocks]
        self.runner.move(BlockMoves(swap_outs=list(zip(sequence.blocks, host, strict=True))))
        self.release(name)
        self._swapped[name] = _Sequence(sequence.num_tokens, host)

    def swap_in(self, name: str) -> None:
        """Move a swapped sequence's blocks back, to whatever blocks are free."""
        swapped = self._swapped.pop(name)
        self._sequences[name] = sequence = _Sequence(swapped.num_tokens)
        for _ in swapped.blocks:
            self._take_block(sequence)
        pairs = list(zip(swapped.blocks, sequence.blocks, strict=True))
        self.runner.move(BlockMoves(swap_ins=pairs))
        self._free_host += swapped.blocks

    def release(self, name: str) -> None:
        """Give a sequence's blocks back; those nobody else uses are poisoned."""
        for block in self._sequences.pop(name).blocks:
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._free.append(block)
                self.runner.pool.poison([block])

    def pack(self, work: Mapping[str, Sequence[int]]) -> PackedTokens:
        """The batch of one step, its tokens already counted as cached; `step` also runs it."""
        block_size = self.block_size
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for name, tokens in work.items():
            assert tokens, f"no tokens for {name}"
            sequence = self._sequences.setdefault(name, _Sequence())
            first, last = sequence.num_tokens, sequence.num_tokens + len(tokens)
            while len(sequence.blocks) * block_size < last:
                self._take_block(sequence)
            sequence.num_tokens = last
            positions += range(first, last)
            slots += [
                sequence.blocks[p // block_size] * block_size + p % block_size
                for p in range(first, last)
            ]
            starts.append(len(positions))
        sequences = [self._sequences[name] for name in work]
        width = max(len(sequence.blocks) for sequence in sequences)
        tables = [s.blocks + [0] * (width - len(s.blocks)) for s in sequences]
        return PackedTokens(
            token_ids=torch.tensor([token for tokens in work.values() for token in tokens]),
            positions=torch.tensor(positions),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor([s.num_tokens for s in sequences], dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            slots=torch.tensor(slots),
            sample_indices=torch.arange(len(positions)),
        )

    def _take_block(self, sequence: _Sequence) -> None:
        block = self._free.pop()
        self._num_users[block] = 1
        sequence.blocks.append(block)
