"""How far the original's own rounding in a half dtype moves rows of logits.

A router near a tie chooses other experts under any rounding, and the row's logits jump: no single
run tells how many rows do. Owns the sampling of it by Monte Carlo arithmetic (D. S. Parker, 1997):
the original is run again with every product perturbed in its last place.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.proving.original import (
    TOLERANCE_FACTOR,
    LoadedOriginal,
    OriginalModel,
    References,
    ask,
    row_errors,
)

logger = logging.getLogger(__name__)

# Of a served form that is no noisier than these, the k-th largest error is larger than theirs with
# a chance of 1 in 65, and twice as large hardly ever. Drawn only until they explain all errors.
MAX_SAMPLES = 64
# Below TOLERANCE_FACTOR, because a sample has about twice the original's own noise.
SAMPLE_FACTOR = 2
# Operations of aten that sum products, or look the first activations up.
PERTURBED = frozenset(
    {
        "_grouped_mm",
        "addmm",
        "baddbmm",
        "bmm",
        "convolution",
        "einsum",
        "embedding",
        "linear",
        "matmul",
        "mm",
        "scaled_dot_product_attention",
    }
)


class OtherRounding(TorchDispatchMode):
    """While active, each product in `dtype` is off by up to one unit in its last place."""

    supports_higher_order_operators = True

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", None)
        if getattr(packet, "__name__", "") not in PERTURBED or found.dtype != self._dtype:
            return found
        unit = torch.finfo(self._dtype).eps
        units = torch.rand(found.shape, generator=self._generator).mul_(2).sub_(1)
        return (found.float() * (1 + unit * units)).to(self._dtype)


class RowNoise:
    """What rows of logits may be off by, from the original's own deviations.

    The k-th largest error of a run may be four times the k-th largest that the original itself
    makes in these rows, or twice that of a sample: as many rows may jump, as far, as do in the
    original, whichever they are. Rows that err less than its median row are judged by that.
    """

    def __init__(self, original: OriginalModel, dtype: torch.dtype, references: References) -> None:
        self._original = original
        self._dtype = dtype
        self._traces = references.traces
        self._own = own = references.deviations_of[dtype]
        median = float(own[own > 0].median()) if (own > 0).any() else 0.0
        self._least = max(TOLERANCE_FACTOR * median, references.floor)
        self._samples: list[Tensor] = []  # [rows] each
        self._can_sample = True

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def allowed(self, rows: Tensor) -> Tensor:
        """What the errors of these rows `[n]` may be, in descending order."""
        allowed = TOLERANCE_FACTOR * self._own[rows].sort(descending=True).values
        for sample in self._samples:
            noise = SAMPLE_FACTOR * sample[rows].sort(descending=True).values
            allowed = torch.where(noise.isfinite(), allowed.maximum(noise), allowed)
        return allowed.clamp(min=self._least)

    def explains(self, rows: Tensor, errors: Tensor) -> bool:
        """Whether the noise known so far accounts for the `errors` [n] of one run."""
        return bool((errors.sort(descending=True).values <= self.allowed(rows)).all())

    def sample_for(self, runs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Sample until every run (rows, errors) is explained, or there are `MAX_SAMPLES`."""
        if not all(errors.isfinite().all() for _, errors in runs):
            return  # which no rounding explains
        loaded: LoadedOriginal | None = None
        while self._can_sample and not all(self.explains(*run) for run in runs):
            loaded = loaded or self._original.load(self._dtype)
            self._sample(loaded)

    def _sample(self, loaded: LoadedOriginal) -> None:
        try:
            with OtherRounding(self._dtype, seed=self.num_samples):
                found = ask(loaded, [(trace.tokens, trace.ends) for trace in self._traces])
        except (RuntimeError, TypeError) as error:  # an operation that no mode can see through
            logger.info("the original cannot be rounded otherwise: %s", error)
            self._can_sample = False
            return
        self._samples.append(row_errors(found, [trace.reference for trace in self._traces]))
        self._can_sample = self.num_samples < MAX_SAMPLES
