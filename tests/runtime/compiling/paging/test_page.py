"""Hand-written decoders become paged graphs that compute the same; others are refused."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from runtime.compiling.paging import NotPageable, PagedGraph, cast, page
from tests.runtime.compiling.paging import decoders
from tests.runtime.compiling.paging.decoders import (
    CAP,
    CONTEXT,
    HEADS,
    HIDDEN,
    VOCAB,
    WINDOW,
    Attention,
    HandWritten,
    causal,
    export,
)
from tests.runtime.compiling.paging.replaying import largest_difference


def paged_equal(
    model: nn.Module, dtype: torch.dtype = torch.int64, **options: object
) -> PagedGraph:
    paged = page(export(model, dtype=dtype, **options))  # type: ignore[arg-type]
    assert largest_difference(paged, model, VOCAB, dtype) < 2e-5
    return paged


@pytest.mark.parametrize(
    ("attention", "num_kv_heads"),
    [
        (decoders.fused, 4),
        (decoders.fused_grouped, 2),
        (decoders.masked_fill, 4),
        (decoders.additive, 4),
        (decoders.einsum, 4),
        (decoders.flat, 4),
        (decoders.repeat_interleaved, 2),
        (decoders.expanded, 1),
        (decoders.five_axes, 2),
        (decoders.narrow_values, 4),
    ],
)
def test_attention_in_any_spelling(attention: Attention, num_kv_heads: int) -> None:
    paged = paged_equal(HandWritten(attention))
    assert [layer.num_kv_heads for layer in paged.layers] == [num_kv_heads] * 2
    assert paged.layers[0].num_heads == HEADS
    assert paged.max_context_tokens == CONTEXT  # the learned table's


def test_attention_that_torch_took_apart() -> None:
    """A program decomposed to core operators has no fused attention any more."""
    model = HandWritten(decoders.fused_mask, positions="rotary")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its tree specs
        program = export(model).run_decompositions()
    paged = page(program)
    assert paged.layers[0].attention.sliding_window == WINDOW
    assert largest_difference(paged, model, VOCAB) < 2e-5


@pytest.mark.parametrize("attention", [decoders.fused_mask, decoders.sliding])
def test_a_sliding_window_is_seen_in_the_mask(attention: Attention) -> None:
    paged = paged_equal(HandWritten(attention, positions="rotary"))
    assert paged.layers[1].attention.sliding_window == WINDOW


def test_a_window_longer_than_any_probe_is_seen_too() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        mask = (at[:, None] >= at[None]) & (at[:, None] < at[None] + 4321)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    paged = page(export(HandWritten(attend, positions="rotary")))
    assert paged.layers[0].attention.sliding_window == 4321


def test_soft_caps_slopes_and_sinks_are_read_off() -> None:
    capped = paged_equal(HandWritten(decoders.capped)).layers[0].attention
    assert capped.soft_cap == pytest.approx(CAP)
    assert capped.scale == pytest.approx(0.9)
    sloped = paged_equal(HandWritten(decoders.alibi, positions="none")).layers[0].attention
    assert sloped.alibi_slopes == pytest.approx((0.5, 0.25, 0.125, 0.0625))
    sunk = paged_equal(HandWritten(decoders.sink)).layers[0].attention
    assert sunk.sinks == pytest.approx((0.5, -1.0, 2.0, 0.0))


@pytest.mark.parametrize("positions", ["learned", "rotary", "rotary_buffer", "none"])
def test_positions_come_from_tables(positions: str) -> None:
    paged = paged_equal(HandWritten(decoders.fused, positions=positions))
    is_bounded = positions in ("learned", "rotary_buffer")
    assert paged.max_context_tokens == (CONTEXT if is_bounded else 32768)
    assert bool(paged.notes) == (not is_bounded) or "reach" in paged.notes[0]


@pytest.mark.parametrize("output", ["tuple", "dict"])
def test_logits_among_other_outputs(output: str) -> None:
    paged_equal(HandWritten(decoders.masked_fill, output=output, is_tied=True))


def test_other_token_ids_and_batches() -> None:
    paged_equal(HandWritten(decoders.additive), dtype=torch.int32)
    paged_equal(HandWritten(decoders.additive), batch=Dim.DYNAMIC)
    paged_equal(
        HandWritten(decoders.masked_fill), batch=Dim("batch", max=8), length=Dim("n", max=64)
    )


def test_the_context_asked_for_is_kept() -> None:
    program = export(HandWritten(decoders.fused, positions="rotary"))
    assert page(program, max_context_tokens=512).max_context_tokens == 512
    assert (
        page(export(HandWritten(decoders.fused), length=Dim("n", max=64))).max_context_tokens == 64
    )


@pytest.mark.parametrize("output", ["tensor", "dict"])
def test_only_sampled_rows_reach_the_output_layer(output: str) -> None:
    paged = page(export(HandWritten(decoders.fused, output=output, is_tied=True)))
    last = [node for node in paged.module.graph.nodes if "linear" in str(node.target)][-1]
    assert isinstance(last.args[0], torch.fx.Node)
    assert "index_select" in str(last.args[0].target)


def test_half_precision_and_its_cast() -> None:
    model = HandWritten(decoders.additive, positions="rotary_buffer").bfloat16()
    program = export(model)
    half = page(program)
    assert half.dtype == torch.bfloat16
    assert largest_difference(half, model, VOCAB) < 0.05
    exact = page(cast(program, torch.float64))
    assert exact.dtype == torch.float64
    wide = HandWritten(decoders.additive, positions="rotary_buffer").bfloat16().double()
    assert largest_difference(exact, wide, VOCAB) < 2e-5


# --- refusals ---------------------------------------------------------------------------


def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v)


def shifted_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(1)
    return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def blind_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(-1)
    return (q @ k.mT).masked_fill(~mask, -1e30).softmax(-1) @ v


def strided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    mask = causal(q.shape[2]) & ((at[:, None] - at[None]) % 3 == 0)
    return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def far_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Chunks of 1000 tokens: plainly causal as far as a short sequence shows."""
    at = torch.arange(q.shape[2])
    mask = (at[:, None] >= at[None]) & (at[:, None] // 1000 == at[None] // 1000)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def content_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    visible = causal(q.shape[2]) & (k.sum(-1) > 0)[:, :, None]
    return (q @ k.mT).masked_fill(~visible, -1e9).softmax(-1) @ v


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) ** 2
    return scores.masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1) @ v


def reweighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1)
    return (weights * 0.5) @ v


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (bidirectional, "later tokens"),
        (shifted_mask, "later tokens"),
        (blind_mask, "later tokens|itself"),
        (strided, "neither causal"),
        (far_block, "neither causal"),
        (content_mask, "depends on the token"),
        (squared, "not understood|scaled|none that"),
        (reweighted, "changed after the softmax"),
    ],
)
def test_attention_that_is_not_understood(attention: Attention, reason: str) -> None:
    with pytest.raises(NotPageable, match=reason):
        page(export(HandWritten(attention, positions="rotary")))


def running_mean(hidden: Tensor) -> Tensor:
    return hidden + hidden.cumsum(1) / 10


def token_shift(hidden: Tensor) -> Tensor:
    return hidden + nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]


def mean_over_time(hidden: Tensor) -> Tensor:
    return hidden - hidden.mean(1, keepdim=True)


def divided_by_length(hidden: Tensor) -> Tensor:
    return hidden / hidden.shape[1]


def convolution(hidden: Tensor) -> Tensor:
    weight = torch.ones(HIDDEN, 1, 3) / 3
    padded = nn.functional.pad(hidden.transpose(1, 2), (2, 0))
    return nn.functional.conv1d(padded, weight, groups=HIDDEN).transpose(1, 2)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (running_mean, "cumsum"),
        (token_shift, "pad"),
        (mean_over_time, "mean"),
        (divided_by_length, "number of tokens"),
        (convolution, "pad"),
    ],
)
def test_tokens_that_meet_outside_of_attention(
    between: Callable[[Tensor], Tensor], reason: str
) -> None:
    with pytest.raises(NotPageable, match=reason):
        page(export(HandWritten(decoders.fused, between=between)))


def test_positions_that_depend_on_the_length() -> None:
    with pytest.raises(NotPageable, match="length of the sequence"):
        page(export(HandWritten(decoders.fused, positions="rotary_dynamic")))


def test_a_fixed_length() -> None:
    with pytest.raises(NotPageable, match="fixed at 9"):
        page(export(HandWritten(decoders.fused), length=None))


def test_no_attention() -> None:
    class Recurrent(nn.Module):
        """A recurrent state, unrolled by a scan that is linear in time."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, HIDDEN)
            self.head = nn.Linear(HIDDEN, VOCAB)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embed(input_ids).cumsum(1).tanh())

    with pytest.raises(NotPageable, match="No attention"):
        page(export(Recurrent()))


def test_control_flow_on_values() -> None:
    def branch(hidden: Tensor) -> Tensor:
        return torch.cond(hidden.sum() > 0, lambda x: x + 1, lambda x: x - 1, (hidden,))

    with pytest.raises(NotPageable, match="cond"):
        page(export(HandWritten(decoders.fused, between=branch)))
