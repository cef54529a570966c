"""What the gateway costs: requests per second and added latency, with durable metering.

    python -m benchmarks.gateway [--requests 20000] [--concurrency 32] [--database URL]

Starts the whole appliance with workers that compute nothing, and loads it over HTTP/1.1 from this
process. Added latency is what a request takes through the gateway less what the same exchange of
frames takes directly with such a worker, both with one request at a time. At the end everything
answered must be on record: the count of metered requests is compared.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import uvloop

from runtime.protocol import (
    LENGTH,
    FromWorker,
    Generate,
    Message,
    Predict,
    SamplingParams,
    Start,
    Step,
    Tensor,
    encode_frame,
)

Send = Callable[[], Awaitable[None]]
Connect = Callable[[], Awaitable[Send]]

KEY = "tp-benchmark-0123456789"
BODIES = {
    "completion": ("/v1/completions", {"model": "decoder", "prompt": "hello", "max_tokens": 1}),
    "completion of 16": (
        "/v1/completions",
        {"model": "decoder", "prompt": "hello", "max_tokens": 16},
    ),
    "stream of 16": (
        "/v1/chat/completions",
        {
            "model": "decoder",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 16,
            "stream": True,
        },
    ),
    "predict": ("/models/tensor/predict", {"inputs": {"x": [[1, 2, 3, 4]]}}),
    "predict of 64": (
        "/models/tensor/predict",
        {"inputs": {"x": [[number / 7 for number in range(64)]]}},
    ),
}


def percentile(seconds: list[float], share: float) -> float:
    """In milliseconds."""
    return sorted(seconds)[int(len(seconds) * share)] * 1e3


async def measure(
    connect: Connect, num_requests: int, concurrency: int
) -> tuple[float, list[float]]:
    """Requests per second and each one's seconds."""
    clients = [await connect() for _ in range(concurrency)]
    seconds: list[float] = []

    async def run(client: Send) -> None:
        for _ in range(num_requests // concurrency):
            started = time.perf_counter()
            await client()
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(run(client) for client in clients))
    return len(seconds) / (time.perf_counter() - started), seconds


def http_client(port: int, path: str, body: dict[str, object]) -> Connect:
    """A keep-alive connection that sends one prepared request again and again."""
    content = json.dumps(body).encode()
    request = (
        f"POST {path} HTTP/1.1\r\nHost: box\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    ).encode() + content

    async def connect() -> Send:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def send() -> None:
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

    return connect


def frame_client(path: str, name: str) -> Connect:
    """The same exchange of frames as the gateway's, with the worker alone."""
    decoder = msgspec.msgpack.Decoder(FromWorker)
    max_tokens = BODIES[name][1].get("max_tokens", 0)
    number = iter(range(10**9))

    async def connect() -> Send:
        reader, writer = await asyncio.open_unix_connection(path)

        async def receive() -> Message:
            (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            return decoder.decode(await reader.readexactly(length))

        async def send() -> None:
            request_id = f"req_{next(number):026d}"
            if not max_tokens:
                tensor = Tensor(name="x", dtype="float32", shape=[1, 4], data=bytes(16))
                writer.write(encode_frame(Predict(request_id=request_id, inputs=[tensor])))
                await receive()
                return
            sampling = SamplingParams(max_tokens=int(str(max_tokens)))
            generate = Generate(
                request_id=request_id, sampling=sampling, cache_salt=b"salt", text="hello"
            )
            writer.write(encode_frame(generate))
            await receive()
            writer.write(encode_frame(Start(request_id=request_id)))
            while True:
                step = await receive()
                assert isinstance(step, Step)
                if step.outputs[0].finish_reason is not None:
                    return

        return send

    return connect


def get(port: int, path: str) -> dict[str, object]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - our own box
        return json.load(response)


async def wait_until_serving(port: int) -> None:
    for path, body in BODIES.values():
        for _ in range(200):
            try:
                await (await http_client(port, path, body)())()
                break
            except (OSError, RuntimeError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.1)
        else:
            raise RuntimeError("the appliance does not answer")


async def run(port: int, pid: int, worker_socket: str, arguments: argparse.Namespace) -> int:
    """Returns how many requests were answered."""
    await wait_until_serving(port)
    num_answered = len(BODIES)
    print(f"{'':18}{arguments.concurrency} at once{'':27}one at a time{'':9}added")
    print(
        f"{'':18}{'req/s':>8}{'p50 ms':>9}{'p99 ms':>9}{'CPU ms':>9}"
        + f"{'p50 ms':>11}{'p99 ms':>9}" * 2
    )
    for name in arguments.only or BODIES:
        path, body = BODIES[name]
        gateway, direct = http_client(port, path, body), frame_client(worker_socket, name)
        few = arguments.requests // 10
        _, alone = await measure(gateway, few, 1)
        _, frames = await measure(direct, few, 1)
        cpu_before = cpu_seconds(pid)
        rate, loaded = await measure(gateway, arguments.requests, arguments.concurrency)
        cpu_ms = (cpu_seconds(pid) - cpu_before) * 1e3 / len(loaded)
        num_answered += len(alone) + len(loaded)
        p50, p99 = percentile(alone, 0.5), percentile(alone, 0.99)
        print(
            f"{name:18}{rate:8.0f}{percentile(loaded, 0.5):9.2f}{percentile(loaded, 0.99):9.2f}"
            f"{cpu_ms:9.3f}{p50:11.3f}{p99:9.3f}{p50 - percentile(frames, 0.5):11.3f}"
            f"{p99 - percentile(frames, 0.99):9.3f}"
        )
    return num_answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--database", default="", help="PostgreSQL URL; SQLite without")
    parser.add_argument("--only", nargs="*", choices=list(BODIES))
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"TAPEOUT_ADMIN_KEY": KEY, "TAPEOUT_LOG_LEVEL": "WARNING"}
        if arguments.database:
            environment["TAPEOUT_DATABASE_URL"] = arguments.database
        worker_socket = f"{directory}/worker.sock"
        module = [sys.executable, "-m"]
        server = subprocess.Popen(
            [*module, "benchmarks.gateway_server", f"{directory}/data", str(port)], env=environment
        )
        worker = subprocess.Popen([*module, "benchmarks.null_worker", "--socket", worker_socket])
        try:
            num_answered = uvloop.run(run(port, server.pid, worker_socket, arguments))
            rows = get(port, "/api/usage")["rows"]
            assert isinstance(rows, list)
            num_metered = sum(row["requests"] for row in rows)
            print(f"answered {num_answered}, metered {num_metered}; peak {memory_of(server.pid)}")
        finally:
            worker.kill()
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()
            server.wait()
            worker.wait()


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return line.split(":")[1].strip()
    return "unknown"


if __name__ == "__main__":
    main()
