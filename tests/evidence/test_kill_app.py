"""The real appliance, killed with -9 under streams over HTTP, and started again."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, make_url

from tests.evidence.invariants import problems

KEY = "tp-evidence-0123456789"
NUM_KILLS = int(os.environ.get("SOAK_APP_KILLS", "20"))
NUM_CLIENTS = 16
ROOT = Path(__file__).parents[2]


class App:
    """One appliance, its lives, and what its clients saw."""

    def __init__(self, directory: Path, url: str) -> None:
        self._directory = directory / "data"
        self._database_url = url
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self._port}"
        self.delivered: dict[str, int] = {}
        self.ended: set[str] = set()

    def start(self, failpoint: str = "") -> "subprocess.Popen[bytes]":
        """Returns once it answers, or is dead."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.evidence.app_server", self._directory, str(self._port)],
            cwd=ROOT,
            env={
                **os.environ,
                "TAPEOUT_ADMIN_KEY": KEY,
                "TAPEOUT_DATABASE_URL": self._database_url,
                "FAILPOINT": failpoint,
            },
        )
        body = {"model": "decoder", "prompt": "hello", "max_tokens": 1}
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                headers = {"Authorization": f"Bearer {KEY}"}
                url = f"{self.base_url}/v1/completions"
                if httpx.post(url, json=body, headers=headers, timeout=10).status_code == 200:
                    break
            time.sleep(0.1)
        return process

    async def load(self, process: "subprocess.Popen[bytes]", kill_after_seconds: float) -> None:
        """Streams until the process is gone: killed by us then, unless it died before."""
        clients = [asyncio.create_task(self._client()) for _ in range(NUM_CLIENTS)]
        await asyncio.wait(clients, timeout=kill_after_seconds)
        process.send_signal(signal.SIGKILL)
        await asyncio.gather(*clients)

    async def _client(self) -> None:
        async with httpx.AsyncClient(base_url=self.base_url, timeout=20) as client:
            with contextlib.suppress(httpx.TransportError):
                while True:
                    await self._stream(client)

    async def _stream(self, client: httpx.AsyncClient) -> None:
        body = {"model": "decoder", "prompt": "hello", "max_tokens": 24, "stream": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            assert answer.status_code == 200
            request_id = answer.headers.get("x-request-id", "")
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    self.ended.add(request_id)
                elif line.startswith("data: "):
                    text = json.loads(line[6:])["choices"][0]["text"]
                    seen = self.delivered.get(request_id, 0)
                    self.delivered[request_id] = seen + text.count("x")

    def examine(self) -> str:
        """After a recovery. Returns the totals to report."""
        engine = create_engine(make_url(self._database_url))
        with engine.begin() as connection:
            found = problems(connection)
            found += [f"held: {row}" for row in connection.exec_driver_sql("SELECT * FROM hold")]
            rows = connection.exec_driver_sql(
                "SELECT e.request_id, l.quantity, l.disposition FROM usage_event e"
                " JOIN usage_line l ON l.event_id = e.id WHERE l.dimension = 'output'"
            ).all()
        engine.dispose()
        recorded = {request_id: (quantity, what) for request_id, quantity, what in rows}
        for request_id, num_tokens in self.delivered.items():
            if recorded.get(request_id, (0, ""))[0] < num_tokens:
                found.append(f"{request_id}: {num_tokens} delivered, {recorded.get(request_id)}")
        found += [
            f"{request_id} ended: {recorded.get(request_id)}"
            for request_id in self.ended
            if recorded.get(request_id) != (24, "billed")
        ]
        assert not found, "\n".join(found[:20])
        return (
            f"{len(self.delivered):,} streams, {sum(self.delivered.values()):,} tokens delivered,"
            f" {len(self.ended):,} ended, 0 lost, 0 doubled"
        )


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (0, -signal.SIGTERM)


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "num_kills",
    [pytest.param(2, id="short"), pytest.param(NUM_KILLS, id="long", marks=pytest.mark.soak)],
)
def test_the_appliance_killed_under_load_loses_and_doubles_nothing(
    tmp_path: Path, database_url: str, num_kills: int
) -> None:
    """By a failpoint somewhere deep in its work, and at any moment, in turn."""
    app, rng = App(tmp_path, database_url), random.Random(num_kills)  # noqa: S311
    for kill in range(num_kills):
        failpoint = f"*:{rng.randint(200, 4_000)}" if kill % 2 else ""
        process = app.start(failpoint)
        if process.poll() is None:
            asyncio.run(app.load(process, 20.0 if failpoint else 0.5 + rng.random()))
        assert process.wait(60) == -signal.SIGKILL
    stop(app.start())
    print(f"\n{num_kills} kills: {app.examine()}")  # noqa: T201 - the figures to record
    assert sum(app.delivered.values()) > 100
