"""How fast the CPU operators are: alone against torch's, and together as a decoder's step.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.kernels [--threads 2] [--rounds 10]

The step is a 135M-parameter Llama's in bfloat16 (30 layers of 576, 9 heads and 3 kv heads of 64,
1536 in the middle, a vocabulary of 49,152), written out here as the calls a compiled graph makes.
Everything is run interleaved; the median and the best are shown, since cores may be shared.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import BLOCK_SIZE, make_batch, make_pool
from runtime.cache.pool import KvShape
from runtime.execution import ops
from runtime.execution.attention import AttentionMetadata, AttentionSpec, choose_backend
from runtime.execution.linear import PackedLinear

NUM_LAYERS, HIDDEN, MIDDLE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49152
LINEARS = {
    "qkv": (HIDDEN + 2 * KV_HEADS * HEAD_DIM, HIDDEN),
    "output": (HIDDEN, HIDDEN),
    "gate and up": (2 * MIDDLE, HIDDEN),
    "down": (HIDDEN, MIDDLE),
    "vocabulary": (VOCABULARY, HIDDEN),
}
LAST = "vocabulary"
COLD_BYTES = 128 << 20  # of distinct weights in turn, so that none is still in a cache
# (name, sequences, new tokens of each, context of each)
STEPS = [
    ("decode 1 x 1000", 1, 1, 1000),
    ("decode 16 x 350", 16, 1, 350),
    ("decode 16 x 1100", 16, 1, 1100),
    ("prefill 1 x 1000", 1, 1000, 1000),
    ("chunk 256 at 1000", 1, 256, 1256),
]


def timed(run: Callable[[], object], times: list[float]) -> None:
    started = time.perf_counter()
    run()
    times.append(time.perf_counter() - started)


def linear_rows(rounds: int) -> Iterator[str]:
    """Per layer and number of rows: torch's and the packed product, in GB/s or GFLOP/s."""
    for name, (num_outputs, num_inputs) in LINEARS.items():
        size = num_outputs * num_inputs * 2
        shape = (max(1, COLD_BYTES // size), num_outputs, num_inputs)
        weights = random(shape)
        packed = [PackedLinear(weight) for weight in weights]
        for num_rows in (1, 4, 16, 64, 512):
            x = torch.randn(num_rows, num_inputs).bfloat16()
            plain: list[float] = []
            ours: list[float] = []
            for _ in range(rounds):
                for weight, layer in zip(weights, packed, strict=True):
                    timed(partial(F.linear, x, weight), plain)
                    timed(partial(layer, x), ours)
            unit = "GB/s" if num_rows < 16 else "GFLOP/s"
            work = size if num_rows < 16 else size * num_rows
            shown = [f"{work / statistics.median(t) / 1e9:6.0f}" for t in (plain, ours)]
            best = work / min(ours) / 1e9
            yield f"| {name} | {num_rows} | {shown[0]} | {shown[1]} | {best:6.0f} | {unit} |"


class Step:
    """One step of the model, and the seconds that its parts took."""

    def __init__(self) -> None:
        self.layers = [
            {name: PackedLinear(random(shape)) for name, shape in LINEARS.items() if name != LAST}
            for _ in range(NUM_LAYERS)
        ]
        self.vocabulary = PackedLinear(random(LINEARS[LAST]))
        self.backend = choose_backend("cpu")
        self.spec = AttentionSpec(scale=HEAD_DIM**-0.5)
        self.norm = torch.ones(HIDDEN).bfloat16()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def prepare(self, num_sequences: int, num_new: int, context: int) -> None:
        batch = make_batch(num_sequences, num_new, context)
        self.metadata = AttentionMetadata.from_batch(batch, BLOCK_SIZE)
        self.pool = make_pool([KvShape(KV_HEADS, HEAD_DIM)] * NUM_LAYERS, batch)
        num_tokens = len(batch.token_ids)
        self.hidden = torch.randn(num_tokens, HIDDEN).bfloat16()
        self.angles = torch.randn(2, num_tokens, HEAD_DIM).bfloat16()
        self.sampled = batch.sample_indices

    def part(self, name: str, run: Callable[..., Any], *arguments: object) -> Any:
        started = time.perf_counter()
        result = run(*arguments)
        self.seconds[name] += time.perf_counter() - started
        return result

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        heads = qkv.view(len(qkv), -1, HEAD_DIM)
        both = heads[:, : HEADS + KV_HEADS]
        turned = self.part("rotate", ops.rotate, both, self.angles[0], self.angles[1])
        caches = self.pool.keys(layer), self.pool.values(layer)
        new = turned[:, HEADS:], heads[:, HEADS + KV_HEADS :]
        self.part("write", self.backend.write, *new, *caches, self.metadata.slots)
        query = turned[:, :HEADS]
        attend = self.backend.attend
        return self.part("attend", attend, query, *caches, self.metadata, self.spec).flatten(1)

    def norm_of(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.part("norm", ops.rms_norm, x, self.norm, 1e-5, 0.0, residual)

    def run(self) -> Tensor:
        x, residual = self.hidden, None
        for index, layer in enumerate(self.layers):
            x, residual = self.norm_of(x, residual)
            x = self.attend(index, self.part("qkv", layer["qkv"], x))
            x, residual = self.norm_of(self.part("output", layer["output"], x), residual)
            x = self.part("gate and up", layer["gate and up"], x)
            x = self.part("gated", ops.gated, x, "silu")
            x = self.part("down", layer["down"], x)
        x, _ = self.norm_of(x, residual)
        return self.part(LAST, self.vocabulary, x[self.sampled])


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).mul_(0.02).bfloat16()


def parts_of(step: Step) -> list[tuple[str, float]]:
    return sorted(step.seconds.items(), key=lambda part: -part[1])


def show_step(step: Step, name: str, sizes: tuple[int, int, int], rounds: int) -> None:
    step.prepare(*sizes)
    step.run()
    step.seconds.clear()
    times: list[float] = []
    for _ in range(rounds):
        timed(step.run, times)
    parts = " ".join(f"{k} {v / rounds * 1e3:.2f}" for k, v in parts_of(step))
    median, best = statistics.median(times) * 1e3, min(times) * 1e3
    print(f"{name:<18} {median:8.2f} ms (best {best:.2f}): {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=("linear", "step"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.only != "step":
        print("| layer | rows | torch | packed | packed, best | |\n|---|---|---|---|---|---|")
        for row in linear_rows(arguments.rounds):
            print(row)
    if arguments.only != "linear":
        step = Step()
        for name, *sizes in STEPS:
            show_step(step, name, (sizes[0], sizes[1], sizes[2]), arguments.rounds)


if __name__ == "__main__":
    main()
