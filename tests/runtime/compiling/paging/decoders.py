"""Tiny decoders written by hand, in the many ways people write attention and positions."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

VOCAB = 50
HIDDEN = 24
HEADS = 4
WIDTH = HIDDEN // HEADS
CONTEXT = 96
WINDOW = 5
CAP = 3.0

# (query, key, value) `[batch, heads, length, width]` -> attended, in the same layout.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fused_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    mask = (at[:, None] >= at[None]) & (at[:, None] - at[None] < WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], scale=0.3)


def fused_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], is_causal=True, enable_gqa=True)


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~causal(q.shape[2]), float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1), 0.1, False) @ v


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    mask = torch.full((length, length), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    scores = torch.matmul(q * WIDTH**-0.5, k.transpose(2, 3)) + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.4
    scores = torch.where(causal(q.shape[1]), scores, torch.tensor(-1e4))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).transpose(1, 2)


def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """bmm over batch times heads, with a bias that baddbmm adds."""
    batch, heads, length, width = q.shape
    mask = torch.zeros(length, length).masked_fill(~causal(length), -1e9)
    flat_q, flat_k, flat_v = (x.reshape(batch * heads, length, width) for x in (q, k, v))
    scores = torch.baddbmm(mask[None], flat_q, flat_k.transpose(1, 2), beta=1.0, alpha=0.4)
    return torch.bmm(scores.softmax(-1), flat_v).view(batch, heads, length, width)


def repeat_interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked_fill(q, *(x[:, ::2].repeat_interleave(2, dim=1) for x in (k, v)))


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def repeat(x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        x = x[:, :, None].expand(batch, heads, 4, length, width)
        return x.reshape(batch, heads * 4, length, width)

    return fused(q, repeat(k[:, :1]), repeat(v[:, :1]))


def five_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped heads by broadcasting, without a copy."""
    batch, heads, length, width = q.shape
    q = q.view(batch, 2, 2, length, width)
    k, v = k[:, :2, None], v[:, :2, None]
    scores = (q @ k.transpose(-1, -2) * 0.4).masked_fill(~causal(length), -torch.inf)
    return (scores.softmax(-1) @ v).reshape(batch, heads, length, width)


def sliding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    mask = causal(length) & ~torch.ones(length, length, dtype=torch.bool).tril(-WINDOW)
    scores = (q @ k.mT * 0.4).masked_fill(~mask, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = CAP * torch.tanh(q @ k.mT * 0.9 / CAP)
    scores = scores.masked_fill(~causal(q.shape[2]), -torch.inf)
    return scores.softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    bias = slopes[:, None, None] * (at[None] - at[:, None])
    scores = q @ k.mT * 0.4 + bias
    return scores.masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1) @ v


def sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A learned logit that joins the sum and has no value."""
    length = q.shape[2]
    scores = (q @ k.mT * 0.4).masked_fill(~causal(length), -torch.inf)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]).reshape(1, -1, 1, 1).expand(1, -1, length, -1)
    scores = torch.cat([scores, sinks], -1)
    scores = scores - scores.amax(-1, keepdim=True)
    return scores.softmax(-1)[..., :-1] @ v


def narrow_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.pad(masked_fill(q, k, v[..., :4]), (0, 2))


class Layer(nn.Module):
    def __init__(self, attention: Attention, rotate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.rotate = rotate
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 40), nn.GELU(), nn.Linear(40, HIDDEN))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        qkv = self.qkv(self.norm(hidden)).view(batch, length, 3, HEADS, WIDTH)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        attended = self.attention(self.rotate(q), self.rotate(k), v)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, length, HIDDEN))
        return hidden + self.mlp(hidden)


class HandWritten(nn.Module):
    """Two layers. `positions`: learned, rotary, rotary_buffer or none. `output`: tensor, tuple or
    dict. `between` is applied to the hidden states between the layers."""

    def __init__(
        self,
        attention: Attention,
        positions: str = "learned",
        output: str = "tensor",
        is_tied: bool = False,
        between: Callable[[Tensor], Tensor] | None = None,
        num_labels: int = VOCAB,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions = positions
        self.output = output
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.learned = nn.Embedding(CONTEXT, HIDDEN)
        angles = torch.outer(torch.arange(CONTEXT).float(), 100.0 ** -torch.arange(0, 1, 2 / WIDTH))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("frequencies", 100.0 ** -torch.arange(0, 1, 2 / WIDTH))
        self.layers = nn.ModuleList(Layer(attention, self.rotate) for _ in range(2))
        self.between = between
        self.head = nn.Linear(HIDDEN, num_labels, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def rotate(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        if self.positions == "rotary_buffer":
            cos, sin = self.cos[:length], self.sin[:length]
        elif self.positions.startswith("rotary"):
            at = torch.arange(length, dtype=torch.float32)
            frequencies = self.frequencies
            if self.positions == "rotary_dynamic":  # stretched by the length of the sequence
                frequencies = frequencies / (1 + length / 16)
            angles = torch.outer(at, frequencies)
            cos, sin = angles.cos(), angles.sin()
        else:
            return x
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.embed(input_ids)
        if self.positions == "learned":
            hidden = hidden + self.learned(torch.arange(input_ids.shape[1]))
        for at, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if self.between is not None and at == 0:
                hidden = self.between(hidden)
        logits = self.head(hidden)
        if self.output == "tuple":
            return hidden, logits
        if self.output == "dict":
            return {"states": hidden, "logits": logits.tanh() * 4}
        return logits


def export(
    model: nn.Module,
    dtype: torch.dtype = torch.int64,
    batch: Any = None,
    length: Any = Dim.DYNAMIC,
) -> ExportedProgram:
    """`batch` and `length` are None for a fixed size (1 and 9)."""
    example = torch.arange(9, dtype=dtype)[None].expand(1 if batch is None else 3, -1)
    shapes = {at: dim for at, dim in ((0, batch), (1, length)) if dim is not None}
    with torch.no_grad():
        return torch.export.export(
            model.eval(), (example.clone(),), dynamic_shapes={"input_ids": shapes}, strict=False
        )
