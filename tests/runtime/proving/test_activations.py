"""How long a sequence may be whose model keeps nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from runtime.building.routes import describe_graph, graph_routes
from runtime.compiling.graph_decoder import UncachedGraph
from runtime.importing.exported import ExportedProgramModel
from runtime.importing.signature import read_signature
from runtime.proving.activations import (
    ACTIVATION_BYTES,
    MARGIN,
    STEP_TOKENS,
    UNMEASURED_TOKENS,
    affordable_context,
)
from tests.runtime.compiling.paging.decoders import export

MIB = 1 << 20


class Linear:
    """Takes a kilobyte a token."""

    def logits(self, token_ids: Tensor) -> Tensor:
        return torch.zeros(token_ids.shape[1], 256)[-1:] + 1


class Quadratic(Linear):
    """A square of float32 as well, freed before twice what is linear hides it at short lengths."""

    def logits(self, token_ids: Tensor) -> Tensor:
        length = token_ids.shape[1]
        scores = torch.zeros(length, length)
        del scores
        return super().logits(token_ids)


class Recurrent(Linear):
    """Does something for every token."""

    def logits(self, token_ids: Tensor) -> Tensor:
        kept = [torch.zeros(256) for _ in range(token_ids.shape[1])]
        return kept[-1][None] + 1


@pytest.mark.parametrize("model", [Linear(), Recurrent()])
def test_what_is_linear_limits_by_tokens(model: Linear) -> None:
    found = affordable_context(model, 100_000, 2 * MIB)
    assert found == pytest.approx(2048 / MARGIN, rel=0.01)
    assert affordable_context(model, 1000, 2 * MIB) == 1000


def test_squares_limit_though_short_sequences_do_not_show_them() -> None:
    assert STEP_TOKENS * 3 * 4 < 1024, "at the lengths measured, the square is the smaller"
    found = affordable_context(Quadratic(), 1_000_000, 64 * MIB)
    assert found == pytest.approx((64 * MIB / MARGIN / 4) ** 0.5, rel=0.01)


class Unbounded(nn.Module):
    """Attends to what comes after as well, so that it is not paged, over any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        scores = hidden @ hidden.transpose(1, 2)
        return self.head(scores.softmax(-1) @ hidden)


def test_an_uncached_graph_is_served_as_far_as_its_memory_is_bounded() -> None:
    program = export(Unbounded())
    model = ExportedProgramModel(program, read_signature(program))
    served = graph_routes(model, Path(), describe_graph(model, None))[1].load("It looks ahead.")
    # Scores, and their softmax, of 4 bytes a pair of tokens each.
    expected = (ACTIVATION_BYTES / MARGIN / 8) ** 0.5
    assert served.info.max_context_tokens == pytest.approx(expected, rel=0.05)
    assert isinstance(served.whole, UncachedGraph)
    assert served.whole.info == served.info
    assert served.form.max_context_tokens == served.info.max_context_tokens
    assert served.notes[0].startswith("Of 32,768 tokens of context, ")


def test_what_cannot_be_measured_is_short() -> None:
    class Opaque(Linear):
        def logits(self, token_ids: Tensor) -> Tensor:
            raise NotImplementedError("no such operator here")

    assert affordable_context(Opaque(), 100_000) == UNMEASURED_TOKENS


def test_a_short_context_is_not_measured() -> None:
    assert affordable_context(Quadratic(), 100, 1) == 100
