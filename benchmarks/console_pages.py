"""How long the server takes for each page of the console, on a box with much in it.

    python -m benchmarks.console_pages [--events 1000000] [--repeats 15] [--keep DIRECTORY]

What is in the box is told by `console_box.py`. Pages are asked of the whole application in this
process; what is timed is its answering, from the request to the last byte, without the client.
"""

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from litestar import Litestar
from litestar.routes import HTTPRoute
from sqlalchemy import Engine, event

from app.settings import Settings
from benchmarks.console_box import Seed, settle_some
from tests.app.whole_app import URL, Tenant, add_tenant, running

LIMIT_MS = 100
# Not pages: they stream, or are files whose length is up to the data.
LEFT_OUT = ("/events", ".csv", "/file", "/proof", "/static/{file_path}", "/setup/{token}")


# --- measuring ------------------------------------------------------------------------------


def pages_of(application: Litestar) -> list[str]:
    return sorted(
        route.path_format
        for route in application.routes
        if isinstance(route, HTTPRoute)
        and "GET" in route.methods
        and route.path_format.startswith(("/console/", "/guide"))
        and not route.path_format.endswith(LEFT_OUT)
    )


@contextmanager
def counted() -> Iterator[list[str]]:
    """The SQL statements of every engine, meanwhile."""
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", note)


class Timed:
    """The application, and how long its last answer took, as wall time and work of this process."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self.took_ms = self.worked_ms = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        started, before = time.perf_counter(), time.process_time()
        await self._application(scope, receive, send)
        self.took_ms = (time.perf_counter() - started) * 1e3
        self.worked_ms = (time.process_time() - before) * 1e3


async def measure(
    application: Litestar, tenant: Tenant, values: dict[str, str], options: argparse.Namespace
) -> int:
    """Returns how many pages took too long."""
    timed = Timed(application)
    transport = httpx.ASGITransport(timed)
    num_slow = 0
    print("| page | status | median, ms | p95, ms | CPU, ms | SQL | kB |")
    print("|---|---|---|---|---|---|---|")
    async with httpx.AsyncClient(transport=transport, base_url=URL, timeout=600) as client:
        client.cookies.update(tenant.cookies)
        asked = [path for path in pages_of(application) if options.only in path]
        more = [
            "/console/usage?period=90d",
            f"/console/models?q={values['name']}",
            f"/console/requests?model={values['name']}",  # one that is rarely called
            f"/console/requests?key={values['key_id'][:-3]}199",
        ]
        for path in [*asked, *(path for path in more if options.only in path)]:
            named = values | {"name": "operations"} if path.startswith("/guide") else values
            address = path.format_map(defaultdict(lambda: "none", named))
            took: list[float] = []
            worked: list[float] = []
            for number in range(options.repeats + 1):
                with counted() as statements:
                    answer = await client.get(address)
                if number:  # the first warms templates and caches
                    took.append(timed.took_ms)
                    worked.append(timed.worked_ms)
            median = statistics.median(took)
            p95 = sorted(took)[math.ceil(0.95 * len(took)) - 1]
            num_slow += median > LIMIT_MS
            print(
                f"| `{path}` | {answer.status_code} | {median:.0f} | {p95:.0f} "
                f"| {statistics.median(worked):.0f} | {len(statements)} "
                f"| {len(answer.content) / 1000:,.0f} |",
                flush=True,
            )
            if options.sql:
                print("\n".join(statements))
    return num_slow


async def run(directory: Path, options: argparse.Namespace) -> int:
    settings = Settings(data_dir=directory, optimise=False)
    seeded = directory / "seeded.json"
    if not seeded.exists():
        async with running(settings, has_clerk=False) as application:
            tenant = await add_tenant(application, "operators", is_operator=True)
            book_id = application.state.prices.active.id
        seed = Seed(directory / "tapeout.db", tenant, options.events)
        seed.write()
        values = seed.values | {"book_id": book_id}
        values["request_id"] = settle_some(settings.sync_database_url, tenant)
        seeded.write_text(json.dumps([msgspec.structs.asdict(tenant), values]))
    told, values = json.loads(seeded.read_text())
    async with running(settings, has_clerk=False) as application:
        return await measure(application, Tenant(**told), values, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="pages with this in their address")
    parser.add_argument("--sql", action="store_true", help="print the statements of each page")
    parser.add_argument("--keep", type=Path, help="a directory to make the box in, or one made so")
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, load {os.getloadavg()}")
    with tempfile.TemporaryDirectory() as temporary:
        num_slow = asyncio.run(run(options.keep or Path(temporary), options))
    print(f"\nload {os.getloadavg()}; {num_slow} pages over {LIMIT_MS} ms")


if __name__ == "__main__":
    main()
