"""What a step of a built decoder costs, and how that grows; and where the time goes until the
first token.

    python -m benchmarks.steps ARTIFACT_DIR [--threads 2] [--max-context 8192]

ARTIFACT_DIR is one that a build wrote (`artifacts/` in the data directory). In one process,
without gateway and sockets: engine, scheduler, model and sampler. Medians of greedy decode steps.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import msgspec

NUM_STEPS = 24
NUM_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)
GROWTH_CONTEXT = 256  # of each, where the number of sequences grows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--max-context", type=int, default=CONTEXTS[-1])
    arguments = parser.parse_args()
    # Read by OpenMP when torch is imported.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    stopwatch = Stopwatch()
    import torch

    torch.set_num_threads(arguments.threads)
    stopwatch.lap("import torch")
    from runtime.compiling.packaging import read_manifest
    from runtime.protocol import Serve
    from runtime.starting.decoder import start_paged, warm_up

    stopwatch.lap("import the runtime")
    config = Serve(
        artifact_dir=str(arguments.artifact),
        num_threads=arguments.threads,
        kv_cache_bytes=3 * 1024**3,
    )
    manifest = read_manifest(arguments.artifact)
    if manifest.decoder is None or not manifest.decoder.is_paged:
        raise SystemExit("only a paged decoder has steps to measure")
    engine, ready = start_paged(config, manifest, manifest.decoder)
    stopwatch.lap(f"load the model ({manifest.form}) and make its pool")
    warm_up(engine)
    stopwatch.lap("warm up: the first two tokens")
    bench = Steps(engine, manifest.decoder.vocab_size)
    bench.prefill(32, 1)
    stopwatch.lap("first token of a prompt of 32 tokens")
    print(f"{ready.attention} attention, {arguments.threads} threads, {manifest.decoder.dtype}")
    print(f"{manifest.decoder.kv_bytes_per_token:,} bytes per cached token\n")
    stopwatch.print()
    longest = min(arguments.max_context, manifest.decoder.max_context_tokens) - NUM_STEPS - 2
    print(f"\n| sequences of {GROWTH_CONTEXT} tokens | step | per token |\n|---|---|---|")
    for num_sequences in NUM_SEQUENCES:
        seconds = bench.decode(min(GROWTH_CONTEXT, longest), num_sequences)
        print(
            f"| {num_sequences} | {seconds * 1e3:.1f} ms | {seconds / num_sequences * 1e3:.2f} ms |"
        )
    print("\n| context of one sequence | step | its prefill |\n|---|---|---|")
    for context in sorted({min(context, longest) for context in CONTEXTS}):
        prefill, step = bench.prefill(context, 1), bench.decode(context, 1)
        rate = context / prefill
        print(
            f"| {context:,} | {step * 1e3:.1f} ms | {prefill * 1e3:.0f} ms, {rate:.0f} tokens/s |"
        )


class Stopwatch:
    """Seconds of one part after the other."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, float]] = []
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._parts.append((name, now - self._last))
        self._last = now

    def print(self) -> None:
        for name, seconds in self._parts:
            print(f"{seconds:7.2f} s  {name}")


class Steps:
    """Runs an engine with prompts it has never seen."""

    def __init__(self, engine: object, vocab_size: int) -> None:
        from runtime.engine import DecoderEngine

        assert isinstance(engine, DecoderEngine)
        self._engine = engine
        self._vocab_size = vocab_size
        self._num_requests = 0

    def prefill(self, num_tokens: int, num_sequences: int) -> float:
        """Seconds until each of the prompts has its first token; they are aborted then."""
        ids = self._add(num_tokens, num_sequences)
        started = time.perf_counter()
        waiting = set(ids)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step()}
        seconds = time.perf_counter() - started
        self._end(ids)
        return seconds

    def decode(self, num_tokens: int, num_sequences: int) -> float:
        """Median seconds of a step in which every sequence gets one token."""
        ids = self._add(num_tokens, num_sequences)
        waiting = set(ids)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step()}
        times: list[float] = []
        for _ in range(NUM_STEPS):
            started = time.perf_counter()
            outputs = self._engine.step()
            times.append(time.perf_counter() - started)
            assert len(outputs) == num_sequences
        self._end(ids)
        return statistics.median(times)

    def _add(self, num_tokens: int, num_sequences: int) -> list[str]:
        from runtime.protocol import Generate, SamplingParams

        sampling = SamplingParams(max_tokens=10**6, temperature=0.0, ignore_eos=True)
        ids: list[str] = []
        for _ in range(num_sequences):
            self._num_requests += 1
            token_ids = [
                int.from_bytes(os.urandom(4)) % self._vocab_size for _ in range(num_tokens)
            ]
            request = Generate(
                request_id=f"request {self._num_requests}",
                sampling=msgspec.structs.replace(sampling, seed=self._num_requests),
                cache_salt=os.urandom(16),
                token_ids=token_ids,
            )
            self._engine.add(self._engine.prepare(request))
            ids.append(request.request_id)
        return ids

    def _end(self, ids: list[str]) -> None:
        for request_id in ids:
            self._engine.abort(request_id)
        self._engine.step()


if __name__ == "__main__":
    main()
