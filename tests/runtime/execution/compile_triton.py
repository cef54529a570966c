"""Compiles the Triton kernels for GPUs that need not be there; prints each architecture done."""

import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtime.execution.triton_attention import attend_kernel, write_kernel

SHAPE = {"block_size": 32, "head_dim": 64, "padded_dim": 64}
ATTEND = {
    **SHAPE,
    "group": 3,
    "tile_tokens": 21,
    "tile_rows": 64,
    "tile_keys": 64,
    "has_window": True,
    "has_soft_cap": True,
    "has_slopes": True,
    "has_sinks": True,
    "precision": "tf32",
}
POINTERS = {"query", "keys", "values", "key_cache", "value_cache", "output"}
TYPES = {
    **dict.fromkeys(POINTERS, "*bf16"),
    **dict.fromkeys(("query_start", "context_lens", "block_tables"), "*i32"),
    **dict.fromkeys(("slopes", "sinks"), "*fp32"),
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
            compile_for(architecture, write_kernel, SHAPE)
            compile_for(architecture, attend_kernel, ATTEND)
            sys.stdout.write(f"{architecture}\n")
