"""Paged attention on CPUs by the compiled C++ op (`cpu_attention.cpp`, compiled by `native.py`)."""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from runtime.execution.attention import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSpec,
    per_head,
)
from runtime.execution.native import Variant, library_path, variants
from runtime.execution.reference import ReferenceAttention

logger = logging.getLogger(__name__)

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CpuAttention(AttentionBackend):
    """The C++ op in one instruction set. Other dtypes (float64, in proofs) go to the reference."""

    def __init__(self, variant: Variant) -> None:
        """Raises `OSError` if the library is missing or does not load."""
        self.name = f"cpu-{variant.name}"
        torch.ops.load_library(str(library_path(variant)))
        self._ops: Any = getattr(torch.ops, variant.namespace)
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
    """The fastest compiled variant that this CPU runs, or None if there is none."""
    for variant in variants():
        if not variant.is_supported or not library_path(variant).is_file():
            continue
        try:
            return CpuAttention(variant)
        except OSError as error:
            logger.warning("C++ attention %s does not load: %s", variant.name, error)
    return None
