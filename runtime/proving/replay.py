"""Runs chosen tokens through a `Runner` step by step, with every block placed at random.

The proof's and the tests' stand-in for a scheduler: it decides nothing on its own, so each way
of cutting, mixing and sharing sequences can be asked for by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.execution.runner import Runner


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
        self._num_users = [0] * runner.pool.num_blocks
        shuffled = torch.Generator().manual_seed(seed)
        self._free: list[int] = torch.randperm(runner.pool.num_blocks, generator=shuffled).tolist()
        runner.pool.poison(self._free)

    def step(self, work: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Append tokens to sequences in one step; a new name starts a new sequence.

        Returns float32 logits `[tokens, vocab]` of each sequence's new tokens.
        """
        batch = self.pack(work)
        logits = self.runner.run(batch)
        lengths = [len(tokens) for tokens in work.values()]
        return dict(zip(work, logits.split(lengths), strict=True))

    def share(self, source: str, target: str) -> int:
        """Start `target` with all of `source`'s full blocks; returns the tokens it now has."""
        block_size = self.runner.pool.block_size
        num_blocks = self._sequences[source].num_tokens // block_size
        blocks = self._sequences[source].blocks[:num_blocks]
        for block in blocks:
            self._num_users[block] += 1
        self._sequences[target] = _Sequence(num_blocks * block_size, list(blocks))
        return num_blocks * block_size

    def release(self, name: str) -> None:
        """Give a sequence's blocks back; those nobody else uses are poisoned."""
        for block in self._sequences.pop(name).blocks:
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._free.append(block)
                self.runner.pool.poison([block])

    def pack(self, work: Mapping[str, Sequence[int]]) -> PackedTokens:
        """The batch of one step, its tokens already counted as cached; `step` also runs it."""
        block_size = self.runner.pool.block_size
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
