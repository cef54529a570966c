"""What a decoder computes between attention and linear layers, each as one call.

Compiled C++ (`cpu_rows.cpp`) where it serves, plain torch elsewhere: for float64, other devices
and machines without a compiler. Both compute in float32 at least and round once; rows never
influence each other, so a row's result has the same bits in any batch.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.execution.kernels import NATIVE_DTYPES, fastest_variant, load_variant
from runtime.execution.linear import PackedLinear
from runtime.execution.native import Variant

__all__ = ["ACTIVATIONS", "PackedLinear", "gated", "layer_norm", "rms_norm", "rotate"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
NONE = torch.empty(0)


class RowOps(NamedTuple):
    """The C++ operators' overloads: resolved once, since a step calls them hundreds of times."""

    rms_norm: Any
    add_rms_norm: Any
    layer_norm: Any
    add_layer_norm: Any
    gated: Any
    rotate: Any


def row_ops(variant: Variant) -> RowOps:
    """Those of one variant. Raises `OSError` if it does not load."""
    loaded = load_variant(variant)
    return RowOps(*(getattr(loaded, name).default for name in RowOps._fields))


@cache
def native_ops() -> RowOps | None:
    """The fastest variant's, or None where plain torch serves."""
    variant = fastest_variant()
    return row_ops(variant) if variant else None


def _ops_for(x: Tensor) -> RowOps | None:
    return native_ops() if x.dtype in NATIVE_DTYPES and x.device.type == "cpu" else None


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = x + residual; returns h / rms(h) * (weight + weight_offset), and h.

    x is `[tokens, n]` or `[tokens, heads, n]`, dense in its last dimension; without a residual h is
    x itself. The weight is of x's dtype or float32.
    """
    ops = _ops_for(x)
    if ops is None:
        return _plain_rms_norm(x, weight, eps, weight_offset, residual)
    weight = NONE if weight is None else weight
    if residual is None:
        return ops.rms_norm(x, weight, eps, weight_offset), x
    return ops.add_rms_norm(x, residual, weight, eps, weight_offset)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = x + residual; returns (h - mean) / deviation * weight + bias, and h. See `rms_norm`."""
    ops = _ops_for(x)
    if ops is None:
        return _plain_layer_norm(x, weight, bias, eps, residual)
    weight = NONE if weight is None else weight
    bias = NONE if bias is None else bias
    if residual is None:
        return ops.layer_norm(x, weight, bias, eps), x
    return ops.add_layer_norm(x, residual, weight, bias, eps)


def gated(x: Tensor, activation: str) -> Tensor:
    """activation(x[:, :n]) * x[:, n:] for x `[tokens, 2 n]`; see `ACTIVATIONS` for their names."""
    ops = _ops_for(x)
    if ops is not None:
        return ops.gated(x, activation)
    gate, up = _wide(x).chunk(2, dim=-1)
    return (ACTIVATIONS[activation](gate) * up).to(x.dtype)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, is_interleaved: bool = False) -> Tensor:
    """Rotary position embedding of x `[tokens, heads, head_dim]`, of the first rotary_dim dims.

    `cosines` and `sines` are `[tokens, rotary_dim]`, of x's dtype or float32. Dimension i turns
    with i + rotary_dim / 2 (as in Llama), or each even one with the next if interleaved (GPT-J).
    """
    ops = _ops_for(x)
    if ops is not None:
        return ops.rotate(x, cosines, sines, is_interleaved)
    size = cosines.shape[-1]
    turned, rest = _wide(x[..., :size]), x[..., size:]
    if is_interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        partner = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), dim=-1)
    turned = turned * cosines[:, None] + partner * sines[:, None]
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _plain_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    wide = _wide(summed)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * (_wide(weight) + weight_offset)
    return normed.to(x.dtype), summed


def _plain_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    wide = _wide(summed)
    weight = None if weight is None else weight.to(wide.dtype)
    bias = None if bias is None else bias.to(wide.dtype)
    return F.layer_norm(wide, wide.shape[-1:], weight, bias, eps).to(x.dtype), summed
