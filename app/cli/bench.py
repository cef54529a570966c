"""`tapeout bench`: how fast an endpoint answers, measured as its callers would see it."""

import asyncio
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import click
import httpx

from app.cli.client import Box, Refused
from app.cli.listings import print_table
from app.cli.push import say
from app.cli.workloads import Endpoint, Result, Shape, WorkloadError, Workloads

NUM_REQUESTS = 320
CONCURRENT_REQUESTS = 32
TEXT_TOKENS = 32


@click.command()
@click.argument("name")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Repeat and print medians.",
)
def bench(name: str, rounds: int) -> None:
    """Measure endpoint NAME with the requests that callers send.

    A decoder gets one stream, a shared prefix (unseen and warm), chats, and unrelated prompts; a
    tensor program or an embedder single requests, alone and at once. The calls are real: they are
    metered.
    """
    box = Box()
    version = box.json("GET", f"/api/models/{name}")["latest_version"]
    if version is None or not version["is_serving"]:
        raise Refused(f"{name} is not serving; `tapeout models` shows how it stands.")
    manifest: dict[str, Any] = version["manifest"]
    if manifest["kind"] == "decoder":
        bench_decoder(box, name, manifest["decoder"], rounds)
    elif manifest["kind"] == "tensor":
        bench_tensor(box, name, manifest["schema"])
    else:
        bench_embedder(box, name, manifest["embedder"])


# --- decoders -----------------------------------------------------------------------------


def bench_decoder(box: Box, name: str, decoder: dict[str, Any], rounds: int) -> None:
    """Runs every workload `rounds` times and prints its medians."""
    shape = Shape.within(decoder["max_context_tokens"])
    seed = time.time_ns()
    try:
        num_ids = decoder.get("num_embedded_ids") or decoder["vocab_size"]
        results = asyncio.run(run_rounds(box, name, num_ids, shape, seed, rounds))
    except WorkloadError as error:
        raise Refused(str(error)) from error
    header = ["WORKLOAD", "SPEED", "FIRST TOKEN", "PROMPT TOKENS", "COMPUTED", "OUTPUT TOKENS"]
    print_table(header, [decoder_row(runs) for runs in results.values()])


async def run_rounds(
    box: Box, name: str, vocab_size: int, shape: Shape, seed: int, rounds: int
) -> dict[str, list[Result]]:
    """Every run, by the workload's name."""
    endpoint = Endpoint(box.url, os.environ["TAPEOUT_API_KEY"], name, vocab_size)
    results: dict[str, list[Result]] = {}
    try:
        for number in range(rounds):
            for workload in Workloads(endpoint, shape, seed + number).all:
                result = await workload()
                results.setdefault(result.name, []).append(result)
                say(f"  {result.name}: {result.value:.1f} {result.unit}")
    finally:
        await endpoint.close()
    return results


def decoder_row(runs: list[Result]) -> list[str]:
    """One line of the table: medians over the runs of one workload."""
    last = runs[-1]
    firsts = [run.first_token_ms for run in runs if run.first_token_ms is not None]
    return [
        last.name,
        f"{statistics.median(run.value for run in runs):.1f} {last.unit}",
        f"{statistics.median(firsts):.0f} ms" if firsts else "",
        str(last.prompt_tokens),
        str(round(statistics.median(run.computed_tokens for run in runs))),
        str(last.output_tokens),
    ]


# --- tensor programs and embedders --------------------------------------------------------


def bench_tensor(box: Box, name: str, schema: dict[str, Any]) -> None:
    """Predictions of one row of zeros."""
    inputs = {spec["name"]: zeros(spec) for spec in schema["inputs"]}
    bench_requests(box, f"/models/{name}/predict", lambda: {"inputs": inputs})


def bench_embedder(box: Box, name: str, embedder: dict[str, Any]) -> None:
    """Texts of the same length, each of other tokens."""
    size: int = embedder["vocab_size"]
    length = min(TEXT_TOKENS, embedder["max_tokens"] - embedder["special_tokens"])

    def body() -> dict[str, Any]:
        token_ids = [secrets.randbelow(size) for _ in range(length)]
        return {"model": name, "input": token_ids}

    bench_requests(box, "/v1/embeddings", body)


def bench_requests(box: Box, path: str, body: Callable[[], dict[str, Any]]) -> None:
    """One request at a time, then many at once."""
    rows: list[list[str]] = []
    for limit in (1, CONCURRENT_REQUESTS):
        seconds, latencies = asyncio.run(send_many(box, path, body, limit))
        latencies.sort()
        rows.append(
            [
                f"{limit} at once",
                f"{len(latencies) / seconds:.0f} req/s",
                f"{latencies[len(latencies) // 2] * 1e3:.1f} ms",
                f"{latencies[len(latencies) * 99 // 100] * 1e3:.1f} ms",
            ]
        )
    print_table(["WORKLOAD", "SPEED", "P50", "P99"], rows)


def zeros(spec: dict[str, Any]) -> Any:
    """Nested lists of an input's smallest shape."""
    least: Iterable[int | None] = spec["min_shape"] or spec["shape"]
    value: Any = False if spec["dtype"] == "bool" else 0
    for size in reversed([size or 1 for size in least]):
        value = [value] * size
    return value


async def send_many(
    box: Box, path: str, body: Callable[[], dict[str, Any]], limit: int
) -> tuple[float, list[float]]:
    """Seconds in all, and of each request. Raises `Refused`."""
    headers = {"Authorization": f"Bearer {os.environ['TAPEOUT_API_KEY']}"}
    latencies: list[float] = []
    async with httpx.AsyncClient(base_url=box.url, headers=headers, timeout=60) as http:

        async def one_after_another(count: int) -> None:
            for _ in range(count):
                began = time.perf_counter()
                box.checked(await http.post(path, json=body()))
                latencies.append(time.perf_counter() - began)

        started = time.perf_counter()
        try:
            await asyncio.gather(*(one_after_another(NUM_REQUESTS // limit) for _ in range(limit)))
        except httpx.TransportError as error:
            raise Refused(f"the box went away: {error}") from error
        return time.perf_counter() - started, latencies
