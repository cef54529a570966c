"""Compiles the Triton kernels for GPUs that need not be there; prints each architecture done."""

import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtime.execution.triton_kernels import (
    attend_kernel,
    attend_split_kernel,
    merge_kernel,
    write_kernel,
)

WIDTH = {"head_dim": 64, "padded_dim": 64}
SHAPE = {"block_size": 32, **WIDTH}
RULES = {
    **SHAPE,
    "group": 3,
    "tile_keys": 64,
    "has_window": True,
    "has_soft_cap": True,
    "has_slopes": True,
    "precision": "tf32",
}
SPLIT = {"num_splits": 44, "min_split_keys": 128}
KERNELS = [
    (write_kernel, SHAPE),
    (attend_kernel, {**RULES, "tile_tokens": 21, "tile_rows": 64, "has_sinks": True}),
    (attend_split_kernel, {**RULES, **SPLIT, "tile_rows": 16}),
    (attend_split_kernel, {**RULES, **SPLIT, "tile_rows": 16, "has_window": False}),
    (
        merge_kernel,
        {**WIDTH, **SPLIT, "padded_splits": 64, "has_window": False, "has_sinks": True},
    ),
]
POINTERS = {"query", "keys", "values", "key_cache", "value_cache", "output"}
TYPES = {
    **dict.fromkeys(POINTERS, "*bf16"),
    **dict.fromkeys(("query_start", "context_lens", "block_tables"), "*i32"),
    **dict.fromkeys(("slopes", "sinks", "partial", "tops", "totals"), "*fp32"),
    "slots": "*i64",
    "scale": "fp32",
    "soft_cap": "fp32",
}


def compile_for(architecture: int, kernel: Any, constants: dict[str, Any]) -> None:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    triton.compile(source, target=GPUTarget("cuda", architecture, 32))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        triton.knobs.cache.dir = directory
        for architecture in (80, 90):
            for kernel, constants in KERNELS:
                compile_for(architecture, kernel, constants)
            sys.stdout.write(f"{architecture}\n")
