"""Tokens that meet outside attention are found, in whatever way they do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from runtime.execution.attention import AttentionSpec, LayerSpec
from runtime.execution.runner import Attend
from runtime.importing.locality import affordable_tokens, check_locality
from runtime.importing.program import ImportFailure
from runtime.protocol import DecoderInfo

WIDTH, VOCAB, CONTEXT = 16, 50, 1000
# What is done to the hidden states [tokens, width] before a layer attends.
Mix = Callable[[Tensor], Tensor]


class SmallModel(nn.Module):
    """One layer of attention with four heads on two, and `mix` before it."""

    def __init__(self, mix: Mix, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = [LayerSpec(4, 2, 4, AttentionSpec(0.5))]
        self.mix = mix
        self.tokens = nn.Embedding(VOCAB, WIDTH, dtype=dtype)
        self.positions = nn.Embedding(CONTEXT, WIDTH, dtype=dtype)
        self.project = nn.Linear(WIDTH, 4 * (4 + 2 + 2), dtype=dtype)
        self.head = nn.Linear(WIDTH, VOCAB, dtype=dtype)

    @torch.no_grad()
    def forward(
        self, token_ids: Tensor, positions: Tensor, sample_indices: Tensor, attend: Attend
    ) -> Tensor:
        hidden = self.mix(self.tokens(token_ids) + self.positions(positions))
        query, keys, values = self.project(hidden).unflatten(1, (8, 4)).split((4, 2, 2), dim=1)
        hidden = hidden + attend(0, query, keys, values).flatten(1)
        return self.head(hidden)[sample_indices]


INFO = DecoderInfo(
    architecture="SmallModel",
    vocab_size=VOCAB,
    max_context_tokens=CONTEXT,
    num_layers=1,
    kv_bytes_per_token=64,
    dtype="float32",
    has_tokenizer=False,
    has_chat_template=False,
)


def check(mix: Mix, dtype: torch.dtype = torch.float32, num_tokens: int = 300) -> None:
    check_locality(SmallModel(mix, dtype), INFO, num_tokens, torch.device("cpu"))


def strided(hidden: Tensor) -> Tensor:
    """Adds to each token the mean of all whole groups of 128 before it."""
    mixed = hidden.clone()
    for end in range(128, len(hidden), 128):
        mixed[end:] += hidden[end - 128 : end].mean(0)
    return mixed


MIXES: dict[str, Mix] = {
    "convolution": lambda hidden: hidden + hidden.roll(1, 0) / 2,
    "recurrence": lambda hidden: hidden.cumsum(0),
    "pooling": lambda hidden: hidden + hidden.mean(0),
    "row number": lambda hidden: hidden + torch.arange(len(hidden))[:, None] / 10,
    "a compressor": strided,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_tokens_alone_passes(dtype: torch.dtype) -> None:
    check(lambda hidden: hidden * 2, dtype)
    check(lambda hidden: hidden * 2, dtype, num_tokens=8)


@pytest.mark.parametrize("name", MIXES)
def test_mixing_beside_attention_is_refused(name: str) -> None:
    with pytest.raises(ImportFailure) as caught:
        check(MIXES[name])
    assert caught.value.error.code == "mixes_tokens"


def test_one_router_that_falls_the_other_way_is_not_mixing() -> None:
    def flaky(hidden: Tensor) -> Tensor:
        calls.append(hidden)
        changed = hidden.clone()
        changed[len(calls)] += 1.0
        return changed

    calls: list[Tensor] = []
    check(flaky, num_tokens=8)
    assert len(calls) == 3


def test_large_models_are_looked_at_with_fewer_tokens() -> None:
    assert affordable_tokens(nn.Linear(10, 10), 2048) == 300
    assert affordable_tokens(nn.Linear(10, 10), 64) == 64
    with torch.device("meta"):
        assert affordable_tokens(nn.Linear(100_000, 100_000, bias=False), 2048) == 10
        assert affordable_tokens(nn.Linear(100_000, 1_000_000), 2048) == 8
