"""How fast the attention backends of this machine are, and what share of a step they take.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.attention [--threads 2] [--model DIRECTORY]

Without a model, times attention alone, in the shape of a 135M-parameter Llama (9 heads, 3 kv heads
of 64, bfloat16). With one, also times whole steps of the runner. Backends are run interleaved and
the median is shown: cores may be shared.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from runtime.cache.pool import KvPool, KvShape
from runtime.execution.attention import AttentionBackend, AttentionMetadata, AttentionSpec
from runtime.execution.cpu import CpuAttention
from runtime.execution.native import library_path, variants
from runtime.execution.reference import ReferenceAttention
from runtime.execution.runner import Runner
from runtime.importing.huggingface import load_decoder
from runtime.proving.replay import PackedTokens

BLOCK_SIZE = 32
# (name, sequences, new tokens of each, context of each)
WORKLOADS = [
    ("decode 1 x 1000", 1, 1, 1000),
    ("decode 1 x 8000", 1, 1, 8000),
    ("decode 16 x 300", 16, 1, 300),
    ("decode 16 x 1000", 16, 1, 1000),
    ("prefill 1 x 512", 1, 512, 512),
    ("chunk 512 at 2048", 1, 512, 2048),
]


def make_batch(num_sequences: int, num_new: int, context: int) -> PackedTokens:
    """Blocks are laid out at random, as after hours of serving."""
    width = -(-context // BLOCK_SIZE)
    tables = torch.randperm(num_sequences * width).view(num_sequences, width)
    positions = torch.arange(context - num_new, context)
    slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    num_tokens = num_sequences * num_new
    return PackedTokens(
        token_ids=torch.randint(10, 90, (num_tokens,)),
        positions=positions.repeat(num_sequences),
        query_start=torch.arange(0, num_tokens + 1, num_new, dtype=torch.int32),
        context_lens=torch.full((num_sequences,), context, dtype=torch.int32),
        block_tables=tables.int(),
        slots=slots.flatten(),
        sample_indices=torch.arange(num_new - 1, num_tokens, num_new),
    )


def make_pool(shapes: list[KvShape], batch: PackedTokens) -> KvPool:
    num_blocks = batch.block_tables.numel()
    pool = KvPool(shapes, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.bfloat16)
    pool.storage.normal_()
    return pool


def medians(runs: dict[str, Callable[[], object]], seconds: float = 2.0) -> dict[str, float]:
    """Median milliseconds of each, interleaved until `seconds` have passed."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(next(iter(times.values()))) < 4:
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def attention_run(
    backend: AttentionBackend, pool: KvPool, batch: PackedTokens
) -> Callable[[], None]:
    metadata = AttentionMetadata.from_batch(batch, BLOCK_SIZE)
    query = torch.randn(len(batch.token_ids), 9, 64).bfloat16()
    layers = range(len(pool.shapes))

    def run() -> None:
        for layer in layers:
            backend.attend(
                query, pool.keys(layer), pool.values(layer), metadata, AttentionSpec(64**-0.5)
            )

    return run


def show(name: str, found: dict[str, float]) -> None:
    print(f"{name:<20}", *(f"{label} {ms:9.2f} ms" for label, ms in found.items()), sep="  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory in bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    backends: list[AttentionBackend] = [
        CpuAttention(v) for v in variants() if v.is_supported and library_path(v).is_file()
    ]
    backends.append(ReferenceAttention())
    print(f"{arguments.threads} threads, {os.environ['OMP_WAIT_POLICY']} waits; 30 layers")
    for name, *sizes in WORKLOADS:
        batch = make_batch(*sizes)
        pool = make_pool([KvShape(3, 64)] * 30, batch)
        show(name, medians({b.name: attention_run(b, pool, batch) for b in backends}))
    if arguments.model:
        decoder = load_decoder(arguments.model)
        print(f"whole steps of {decoder.info.architecture}")
        for name, *sizes in WORKLOADS:
            batch = make_batch(*sizes)
            pool = make_pool([layer.kv_shape for layer in decoder.layers], batch)
            runner = Runner(decoder, pool, backends[0])
            show(name, medians({"step": lambda r=runner, b=batch: r.run(b)}))


if __name__ == "__main__":
    main()
