"""Runs models that keep nothing between steps: whole sequences in, next-token logits out.

Owns how the sequences of a step become calls of such a model. `runner.py` is for models whose
attention is paged.
"""

from typing import Protocol

import torch
from torch import Tensor

from runtime.cache.transfer import send
from runtime.execution.batch import StepBatch
from runtime.scheduling.plan import BlockMoves


class WholeModel(Protocol):
    """A decoder that computes a sequence anew for every token."""

    def logits(self, token_ids: Tensor) -> Tensor:
        """Float logits `[sequences, vocab]` of the last token of each row of `token_ids`, int64
        `[sequences, tokens]`: all of one length, none padded."""
        ...


class WholeRunner:
    """Sequences of one length run in one call, at most `max_rows` of them."""

    def __init__(
        self, model: WholeModel, device: torch.device | str = "cpu", max_rows: int = 64
    ) -> None:
        """`max_rows` is 1 for a model that is fixed to one sequence."""
        assert max_rows > 0
        self._model = model
        self._device = torch.device(device)
        self._max_rows = max_rows

    def move(self, moves: BlockMoves) -> None:
        """There are no blocks to move."""
        assert not moves, "there are no blocks to move"

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> Tensor:
        """float32 logits `[sequences, vocab]`: each sequence must be whole, and sampled."""
        lengths = batch.query_start.diff()
        assert torch.equal(lengths, batch.context_lens), "a sequence is not whole"
        assert len(batch.sample_indices) == len(lengths), "a sequence is not sampled"
        by_length: dict[int, list[int]] = {}  # length -> rows of the step
        for row, length in enumerate(lengths.tolist()):
            by_length.setdefault(length, []).append(row)
        sequences = batch.token_ids.split(lengths.tolist())
        found: list[tuple[list[int], Tensor]] = []
        for rows in by_length.values():
            for at in range(0, len(rows), self._max_rows):
                some = rows[at : at + self._max_rows]
                token_ids = torch.stack([sequences[row] for row in some])
                logits = self._model.logits(send(token_ids, self._device))
                assert len(logits) == len(some), "the model lost a sequence"
                found.append((some, logits.float()))
        # Back from the order of the calls to that of the step.
        places = [row for rows, _ in found for row in rows]
        together = torch.cat([logits for _, logits in found])
        return together[send(torch.tensor(places).argsort(), together.device)]
