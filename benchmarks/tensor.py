"""Tapeout beside LitServe and BentoML on tensor models, the same client, batching on everywhere.

    python -m benchmarks.tensor --peers VENV [--only digits] [--rounds 3] [--work-dir DIR]

VENV has `litserve`, `bentoml` and `onnxruntime`; without it only Tapeout is measured. Each peer
runs twice: with the exported module as torch runs it, and with ONNX Runtime, which its user would
have to find out to be faster. Tapeout serves the form that its own optimising chose, through its
gateway, with every request metered durably. All servers of a model are up at once and take turns;
whoever has no turn is stopped (SIGSTOP). In process, `tensor_inside.py` runs the model without any
server. Worth running on a quiet machine only.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.gateway import percentile
from benchmarks.processes import Server, running
from benchmarks.tensor_models import WORKLOADS, Workload, as_json, npy, npz

TAPEOUT = str(Path(sys.executable).with_name("tapeout"))
PEER_DIRECTORY = Path(__file__).with_name("peers")
KEY = "tp-benchmark-0123456789"
FIRST_PORT = 8720
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
CONCURRENCIES = (1, 32)
LARGE_ROWS = 32  # of a request, to compare with a batch in process
LARGE_CONCURRENCY = 4

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Route:
    """How one server is asked."""

    path: str
    content_type: str
    body: Callable[[Inputs], bytes]


@dataclass(frozen=True)
class Load:
    """What one turn of one server gave. Seconds are those of each request."""

    per_second: float
    seconds: list[float]


# --- the servers ------------------------------------------------------------------------


def tapeout_route(workload: Workload) -> Route:
    path = f"/models/{workload.name}/predict"
    if workload.is_binary:
        return Route(path, "application/x-npy", lambda inputs: npy(inputs["image"]))
    return Route(path, "application/json", as_json)


def large_route(workload: Workload) -> Route:
    """Many rows are sent as they lie in memory."""
    path = f"/models/{workload.name}/predict"
    return Route(path, "application/x-npz", npz)


def litserve_route(workload: Workload) -> Route:
    if workload.is_binary:
        return Route("/predict", "application/json", as_base64)
    return Route("/predict", "application/json", as_json)


def bentoml_route(workload: Workload) -> Route:
    """It takes a large array only as JSON or inside a form; a form with a file is the faster."""
    if workload.name == "minilm":
        return Route("/encode", "application/json", as_bento_ids)
    return Route("/predict", "application/json", as_bento_image)


def as_base64(inputs: Inputs) -> bytes:
    return json.dumps({"npy": base64.b64encode(npy(inputs["image"])).decode()}).encode()


def as_bento_ids(inputs: Inputs) -> bytes:
    return json.dumps({"input_ids": inputs["input_ids"].tolist()}).encode()


def as_bento_image(inputs: Inputs) -> bytes:
    return json.dumps({"image": inputs["image"].tolist()}).encode()


@contextlib.contextmanager
def tapeout(work_dir: Path) -> Iterator[Server]:
    port = FIRST_PORT
    command = [TAPEOUT, "serve", "--data-dir", str(work_dir / "tapeout"), "--port", str(port)]
    environment = ENVIRONMENT | {"TAPEOUT_ADMIN_KEY": KEY, "TAPEOUT_LOG_LEVEL": "WARNING"}
    log = work_dir / "tapeout.log"
    url = f"http://127.0.0.1:{port}"
    with running("tapeout", command, url, "/healthz", log, environment) as server:
        yield server


def peer_servers(
    venv: Path, workload: Workload, work_dir: Path, stack: contextlib.ExitStack
) -> dict[str, tuple[Server, Route]]:
    """LitServe and BentoML, each with the model as torch runs it and with ONNX Runtime."""
    servers: dict[str, tuple[Server, Route]] = {}
    exported = work_dir / f"{workload.name}.pt2"
    for index, path in enumerate((exported, exported.with_suffix(".onnx"))):
        engine = {".pt2": "torch", ".onnx": "ONNX Runtime"}[path.suffix]
        port = FIRST_PORT + 1 + 2 * index
        name = f"LitServe, {engine}"
        command = [str(venv / "bin/python"), str(PEER_DIRECTORY / "litserve_server.py")]
        command += [str(path.resolve()), str(port)]
        url, log = f"http://127.0.0.1:{port}", work_dir / f"litserve-{path.suffix[1:]}.log"
        lit = running(name, command, url, "/health", log, ENVIRONMENT)
        servers[name] = stack.enter_context(lit), litserve_route(workload)
        servers[name][0].signal(signal.SIGSTOP)
        port += 1
        name = f"BentoML, {engine}"
        command = [str(venv / "bin/bentoml"), "serve", "bentoml_service:Service"]
        command += ["--port", str(port), "--host", "127.0.0.1"]
        environment = ENVIRONMENT | {
            "MODEL": str(path.resolve()),
            "BENTOML_HOME": str((work_dir / "bentoml").resolve()),
            "BENTOML_DO_NOT_TRACK": "True",
        }
        url, log = f"http://127.0.0.1:{port}", work_dir / f"bentoml-{path.suffix[1:]}.log"
        bento = running(name, command, url, "/readyz", log, environment, PEER_DIRECTORY)
        servers[name] = stack.enter_context(bento), bentoml_route(workload)
        servers[name][0].signal(signal.SIGSTOP)
    return servers


def push(url: str, workload: Workload, path: Path) -> None:
    """Upload, build and optimise, unless an earlier run has: then wait until it serves."""
    environment = os.environ | {"TAPEOUT_URL": url, "TAPEOUT_API_KEY": KEY}

    def models() -> str:
        done = subprocess.run(
            [TAPEOUT, "models"], env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    if workload.name not in models():
        command = [TAPEOUT, "push", str(path), "--name", workload.name, "--optimised"]
        subprocess.run(command, env=environment, check=True)
    while not any(workload.name in line and "serving" in line for line in models().splitlines()):
        time.sleep(1)
    print(models())


# --- the load ---------------------------------------------------------------------------


async def load(
    server: Server, route: Route, requests: list[bytes], concurrency: int, seconds: float
) -> Load:
    """Closed loop: `concurrency` connections, each with one request under way, for `seconds`."""
    port = int(server.url.rpartition(":")[2])
    number = iter(range(10**9))
    taken: list[float] = []
    started = time.perf_counter()

    async def run() -> None:
        send = await connect(port)
        while (now := time.perf_counter()) < started + seconds:
            await send(requests[next(number) % len(requests)])
            taken.append(time.perf_counter() - now)

    await asyncio.gather(*(run() for _ in range(concurrency)))
    return Load(len(taken) / (time.perf_counter() - started), taken)


def prepared(route: Route, inputs: Inputs) -> bytes:
    body = route.body(inputs)
    head = (
        f"POST {route.path} HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: {route.content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def connect(port: int) -> Callable[[bytes], Awaitable[None]]:
    """A keep-alive connection. Answers must be 200 and are read to their end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)

    async def send(request: bytes) -> None:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError((head + await reader.read(2000)).decode())
        if b"content-length: " in head:
            length = head.split(b"content-length: ")[1].split(b"\r\n")[0]
            await reader.readexactly(int(length))
        else:
            await reader.readuntil(b"\r\n0\r\n\r\n")

    return send


async def turn(
    server: Server, route: Route, requests: list[bytes], concurrency: int, seconds: float
) -> Load:
    """Only this server runs; a moment of load first, which does not count."""
    server.signal(signal.SIGCONT)
    try:
        await load(server, route, requests, concurrency, min(1.0, seconds / 4))
        return await load(server, route, requests, concurrency, seconds)
    finally:
        server.signal(signal.SIGSTOP)


# --- one model --------------------------------------------------------------------------


def measure_model(
    workload: Workload, box: Server, venv: Path | None, arguments: argparse.Namespace
) -> None:
    work_dir: Path = arguments.work_dir
    inside = measure_inside(workload, work_dir)
    box.signal(signal.SIGCONT)
    push(box.url, workload, work_dir / f"{workload.name}.pt2")
    box.signal(signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        servers = {"Tapeout": (box, tapeout_route(workload))}
        if venv:
            servers |= peer_servers(venv, workload, work_dir, stack)
        results = asyncio.run(run_rounds(workload, servers, arguments.rounds, arguments.seconds))
    print_results(workload, list(servers), results, inside)


async def run_rounds(
    workload: Workload, servers: dict[str, tuple[Server, Route]], rounds: int, seconds: float
) -> dict[tuple[str, int], list[Load]]:
    """Loads by server and concurrency; 0 stands for requests of `LARGE_ROWS` rows, of Tapeout."""
    small, large = workload.requests(), workload.requests(LARGE_ROWS, 8)
    results: dict[tuple[str, int], list[Load]] = {}
    for number in range(rounds):
        names = list(servers)[:: -1 if number % 2 else 1]
        for concurrency in CONCURRENCIES:
            for name in names:
                server, route = servers[name]
                requests = [prepared(route, inputs) for inputs in small]
                done = await turn(server, route, requests, concurrency, seconds)
                results.setdefault((name, concurrency), []).append(done)
                print(f"  round {number + 1}: {name}, {concurrency} at once: {brief(done)}")
        server, route = servers["Tapeout"][0], large_route(workload)
        requests = [prepared(route, inputs) for inputs in large]
        done = await turn(server, route, requests, LARGE_CONCURRENCY, seconds)
        results.setdefault(("Tapeout", 0), []).append(done)
        print(f"  round {number + 1}: Tapeout, {LARGE_ROWS} rows a request: {brief(done)}")
    return results


def measure_inside(workload: Workload, work_dir: Path) -> dict[str, dict[int, float]]:
    """Milliseconds of a run by engine and rows, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.tensor_inside", workload.name, str(work_dir)]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: {int(rows): ms for rows, ms in times.items()} for name, times in found.items()}


def brief(done: Load) -> str:
    p50, p99 = percentile(done.seconds, 0.5), percentile(done.seconds, 0.99)
    return f"{done.per_second:,.1f} requests/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms"


def print_results(
    workload: Workload,
    names: list[str],
    results: dict[tuple[str, int], list[Load]],
    inside: dict[str, dict[int, float]],
) -> None:
    """Markdown: medians of the rounds, ranges of what is compared."""
    print(f"\n### {workload.name}, {datetime.now(UTC):%d %B %Y}, {os.cpu_count()} cores\n")
    print("| | p50 alone | 32 at once | p50 | p99 | Tapeout is |")
    print("|---|---|---|---|---|---|")
    ours = median_rate(results["Tapeout", 32])
    for name in names:
        alone, loaded = results[name, 1], results[name, 32]
        rates = [run.per_second for run in loaded]
        ratio = "" if name == "Tapeout" else f"{ours / median_rate(loaded):.2f}x"
        print(
            f"| {name} | {median_of(alone, 0.5):.2f} ms | {median_rate(loaded):,.1f}/s "
            f"({min(rates):,.1f}-{max(rates):,.1f}) | {median_of(loaded, 0.5):.1f} ms | "
            f"{median_of(loaded, 0.99):.1f} ms | {ratio} |"
        )
    rows = sorted(next(iter(inside.values())))
    print("\n| in process, ms | " + " | ".join(f"{each} rows" for each in rows) + " |")
    print("|---|" + "---|" * len(rows))
    for engine, times in inside.items():
        print(f"| {engine} | " + " | ".join(f"{times[each]:.3f}" for each in rows) + " |")
    best_one = min(times[1] for times in inside.values())
    best_large = min(times[LARGE_ROWS] for times in inside.values())
    added = median_of(results["Tapeout", 1], 0.5) - best_one
    large = median_rate(results["Tapeout", 0]) * LARGE_ROWS
    share = large * best_large / LARGE_ROWS / 1e3
    print(
        f"\nAlone, the box adds {added:.2f} ms to the fastest run in process. With {LARGE_ROWS} "
        f"rows a request it serves {large:,.0f} rows/s, {share:.0%} of the fastest in process at "
        "that batch.\n"
    )


def median_rate(runs: list[Load]) -> float:
    return statistics.median(run.per_second for run in runs)


def median_of(runs: list[Load], share: float) -> float:
    return statistics.median(percentile(run.seconds, share) for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="virtual environment of the peers")
    parser.add_argument("--only", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--work-dir", type=Path, default=Path(".benchmark"), help="is kept")
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    with tapeout(arguments.work_dir) as box:
        for name in arguments.only:
            box.signal(signal.SIGSTOP)
            WORKLOADS[name].export(arguments.work_dir)
            measure_model(WORKLOADS[name], box, arguments.peers, arguments)


if __name__ == "__main__":
    main()
