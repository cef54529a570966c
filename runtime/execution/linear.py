"""Linear layers whose weights are laid out once for the C++ product (`cpu_linear.cpp`).

Owns the layout. Which layers of a model become packed is the compiler's affair.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.execution.kernels import NATIVE_DTYPES, fastest_variant, load_variant
from runtime.execution.native import Variant

BLOCK_OUTPUTS = 16


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` for x `[..., in]` of the weight's dtype, by the C++ op.

    Packs a copy of `weight` `[out, in]`; the caller may then release the original. Sums are
    float32 along one chain per output, so a row's result has the same bits whatever other rows
    come with it, whatever their number, and whatever the number of threads. Where there is no
    compiled op, and for float64 or CUDA weights, it is `torch.nn.functional.linear`, for which
    none of this is promised.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, variant: Variant | None = None
    ) -> None:
        """`variant` is for tests; by default it is the fastest that this CPU runs."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        variant = variant or fastest_variant()
        weight = weight.detach()
        self._op = None
        if variant and weight.device.type == "cpu" and weight.dtype in NATIVE_DTYPES:
            self._op = load_variant(variant).linear.default
            weight = pack(weight)
            bias = torch.empty(0) if bias is None else bias.float()
        self.dtype = weight.dtype
        self.register_buffer("_weight", weight, persistent=False)
        self.register_buffer("_bias", None if bias is None else bias.detach(), persistent=False)
        self._weight: Tensor
        self._bias: Tensor | None

    @classmethod
    def joined(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> "PackedLinear":
        """Siblings over one input as one product; outputs follow each other in this order."""
        if all(bias is None for bias in biases):
            return cls(torch.cat(list(weights)))
        rows = [
            weight.new_zeros(len(weight)) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return cls(torch.cat(list(weights)), torch.cat(rows))

    @property
    def is_packed(self) -> bool:
        """Whether the C++ op serves it."""
        return self._op is not None

    def forward(self, x: Tensor) -> Tensor:
        if self._op is None:
            return F.linear(x, self._weight, self._bias)
        if x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"rows of {x.shape[-1]} inputs, where {self.in_features} are expected"
            )
        if x.dim() == 2:
            return self._op(x, self._weight, self._bias, self.out_features)
        rows = self._op(x.flatten(0, -2), self._weight, self._bias, self.out_features)
        return rows.view(*x.shape[:-1], self.out_features)

    def weight_rows(self, indices: Tensor) -> Tensor:
        """Rows of the original weight, `[*indices.shape, in]`: an embedding tied to this layer
        needs no second copy."""
        if self._op is None:
            return F.embedding(indices, self._weight)
        flat = indices.flatten()
        rows = self._weight[flat // BLOCK_OUTPUTS, :, flat % BLOCK_OUTPUTS].flatten(1)
        return rows[:, : self.in_features].view(*indices.shape, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, dtype={self.dtype}"


def pack(weight: Tensor) -> Tensor:
    """`[out, in]` as `[blocks, in / step, 16, step]`, zeros behind the last output and input.

    A step is what one instruction consumes of a row: two inputs in bfloat16, else one.
    """
    num_outputs, num_inputs = weight.shape
    step = 2 if weight.dtype == torch.bfloat16 else 1
    missing = (-num_inputs % step, -num_outputs % BLOCK_OUTPUTS)
    padded = F.pad(weight, (0, missing[0], 0, missing[1]))
    blocks = padded.view(-1, BLOCK_OUTPUTS, padded.shape[1] // step, step)
    return blocks.transpose(1, 2).contiguous()
