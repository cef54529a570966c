"""Decoders that look pageable on few random tokens, and are not or only to some length."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from runtime.compiling.paging import NotPageable, page
from tests.runtime.compiling.paging import decoders
from tests.runtime.compiling.paging.decoders import VOCAB, Attention, HandWritten, causal, export
from tests.runtime.compiling.paging.replaying import largest_difference, replay_of


class Sidelong(nn.Module):
    """A decoder to whose embeddings something is added that is made of the token ids."""

    def __init__(self, side: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = HandWritten(decoders.fused)
        self.side = side

    def forward(self, input_ids: Tensor) -> Tensor:
        table = self.inner.learned.weight
        hidden = self.inner.embed(input_ids) + self.side(input_ids, table)
        for layer in self.inner.layers:
            hidden = layer(hidden)
        return self.inner.head(hidden)


def segments(ids: Tensor, table: Tensor) -> Tensor:
    return nn.functional.embedding((ids == VOCAB - 1).long().cumsum(1).clamp(max=3), table)


def restarting_positions(ids: Tensor, table: Tensor) -> Tensor:
    at = torch.arange(ids.shape[1])
    start = torch.where(ids == VOCAB - 1, at[None], 0).cummax(1).values
    return nn.functional.embedding(at[None] - start, table)


def capacity(ids: Tensor, table: Tensor) -> Tensor:
    """An expert that takes only so many tokens."""
    chosen = nn.functional.one_hot(ids % 2, 2)
    return (chosen * (chosen.cumsum(1) <= 60)).to(table.dtype) @ table[:2]


@pytest.mark.parametrize(
    ("side", "reason"),
    [(segments, "cumsum"), (restarting_positions, "cummax"), (capacity, "cumsum")],
)
def test_rare_tokens_and_counts_that_reach_others(
    side: Callable[[Tensor, Tensor], Tensor], reason: str
) -> None:
    with pytest.raises(NotPageable, match=reason):
        page(export(Sidelong(side)))


def post_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    weights = (q @ k.mT).masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1)
    return weights.masked_fill(at[:, None] - at[None] >= 120, 0.0) @ v


def best_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(q.shape[2]), -torch.inf)
    rank = (-scores).argsort(-1).argsort(-1)
    return scores.masked_fill(rank >= 128, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("attention", "reason"), [(post_window, "after the softmax"), (best_keys, "argsort")]
)
def test_attention_that_differs_only_far_away(attention: Attention, reason: str) -> None:
    with pytest.raises(NotPageable, match=reason):
        page(export(HandWritten(attention, positions="rotary")))


class Scaled(HandWritten):
    """Its logits are scaled by position."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.cos[: input_ids.shape[1], :1]


def test_logits_that_read_positions_are_right_for_the_last_row_alone() -> None:
    model = Scaled(decoders.fused)
    tokens = list(range(20))
    paged = page(export(model))
    assert largest_difference(paged, model, VOCAB) < 2e-5
    last = replay_of(paged).step({"a": tokens}, is_last_only=True)["a"]
    assert torch.allclose(last, model(torch.tensor([tokens]))[0, -1:], atol=2e-5)


class Stretched(HandWritten):
    """Positions are squeezed once a sequence is longer than 256 tokens."""

    def rotate(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        stretch = torch.clamp(torch.full((1,), 256.0) / torch.ones(length).sum(), max=1.0)
        at = torch.arange(length, dtype=torch.float32) * stretch
        angles = torch.outer(at, 100.0 ** -torch.arange(0, 1, 2 / x.shape[3]))
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_depend_on_the_length_of_long_sequences(dtype: torch.dtype) -> None:
    model = Stretched(decoders.fused, positions="none").to(dtype)
    assert page(export(model), max_context_tokens=1024).max_context_tokens == 256
