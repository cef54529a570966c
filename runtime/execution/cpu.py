"""Paged attention on CPUs by the compiled C++ op (`cpu_attention.cpp`, compiled by `native.py`)."""

from functools import cache

from torch import Tensor

from runtime.execution.attention import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSpec,
    per_head,
)
from runtime.execution.kernels import NATIVE_DTYPES, fastest_variant, load_variant
from runtime.execution.native import Variant
from runtime.execution.reference import ReferenceAttention


class CpuAttention(AttentionBackend):
    """The C++ op in one instruction set. Other dtypes (float64, in proofs) go to the reference."""

    def __init__(self, variant: Variant) -> None:
        """Raises `OSError` if the library is missing or does not load."""
        self.name = f"cpu-{variant.name}"
        self._ops = load_variant(variant)
        self._reference = ReferenceAttention()

    def write(
        self, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        if key_cache.dtype in NATIVE_DTYPES:
            self._ops.write(keys, values, key_cache, value_cache, slots)
        else:
            self._reference.write(keys, values, key_cache, value_cache, slots)

    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        if key_cache.dtype not in NATIVE_DTYPES:
            return self._reference.attend(query, key_cache, value_cache, metadata, spec)
        return self._ops.attend(
            query,
            key_cache,
            value_cache,
            metadata.query_start,
            metadata.context_lens,
            metadata.block_tables,
            spec.scale,
            spec.sliding_window or 0,
            spec.soft_cap or 0.0,
            per_head(spec.alibi_slopes, query.device),
            per_head(spec.sinks, query.device),
        )


@cache
def load_cpu_attention() -> CpuAttention | None:
    """With the fastest compiled variant that this CPU runs, or None if there is none."""
    variant = fastest_variant()
    return CpuAttention(variant) if variant else None
