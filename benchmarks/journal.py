"""What write-ahead metering costs: the disk's own fdatasync, and what the journal adds to it.

    python -m benchmarks.journal [--directory DIR] [--seconds 3]

Each "engine" commits a step's record and waits for it before the next, as a replica does; steps
that wait together share one fdatasync. The disk alone is measured with records of the same size.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

from app.metering.journal import Journal
from app.metering.records import AdmitRecord, StepRecord, use_of
from app.metering.segments import encode
from runtime.protocol import SequenceOutput


def outputs_of(num_sequences: int) -> list[SequenceOutput]:
    return [
        SequenceOutput(
            request_id=f"req_{index:026d}",
            choice=0,
            token_ids=[1],
            text="",
            num_cached_tokens=0,
            device_ns=1_000_000,
        )
        for index in range(num_sequences)
    ]


def disk_alone(directory: Path, size_bytes: int, seconds: float) -> list[float]:
    """Milliseconds of append and fdatasync, with nothing else around them."""
    path, payload, took = directory / "alone", b"x" * size_bytes, []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        os.write(descriptor, payload)
        os.fdatasync(descriptor)
        took.append((time.perf_counter() - started) * 1e3)
    os.close(descriptor)
    path.unlink()
    return took


async def journal_steps(
    journal: Journal, num_engines: int, num_sequences: int, seconds: float
) -> list[float]:
    """Milliseconds that each step waited for its record."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    outputs = outputs_of(num_sequences)

    async def engine() -> None:
        while time.perf_counter() < end:
            started = time.perf_counter()
            await journal.commit_step(outputs)
            took.append((time.perf_counter() - started) * 1e3)

    await asyncio.gather(*(engine() for _ in range(num_engines)))
    return took


def admit(journal: Journal, num_sequences: int) -> None:
    for output in outputs_of(num_sequences):
        journal.admit(
            AdmitRecord(
                output.request_id,
                *("org_1", "key_1", "name", "tiny", 1, "/v1/completions"),
                *("decoder", "standard", "pb_1", time.time_ns()),
            )
        )


def quantiles(took: list[float]) -> str:
    ordered = sorted(took)
    p99 = ordered[int(len(ordered) * 0.99)]
    return f"p50 {statistics.median(ordered):.3f} ms, p99 {p99:.3f} ms"


async def run(directory: Path, seconds: float) -> None:
    for num_engines, num_sequences in ((1, 1), (1, 32), (4, 32), (16, 8)):
        uses = [use_of(output) for output in outputs_of(num_sequences)]
        size_bytes = len(encode(StepRecord(time.time_ns(), uses)))
        (directory / "journal").mkdir(exist_ok=True)
        alone = disk_alone(directory, size_bytes, seconds)
        journal = Journal(directory / "journal")
        await journal.start()
        admit(journal, num_sequences)
        took = await journal_steps(journal, num_engines, num_sequences, seconds)
        await journal.close()
        added = statistics.median(took) - statistics.median(alone)
        print(
            f"{num_engines:2d} engines x {num_sequences:2d} sequences ({size_bytes} B a step): "
            f"disk {quantiles(alone)}; step {quantiles(took)}; fdatasync + {added:.3f} ms; "
            f"{len(took) / seconds:.0f} steps/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory or Path.cwd()) as directory:
        asyncio.run(run(Path(directory), options.seconds))


if __name__ == "__main__":
    main()
