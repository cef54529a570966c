"""A month of usage on a busy box: what it takes to store, and how long people wait for its sums.

    python -m benchmarks.usage_month [--events 100000] [--database-url postgresql://...]

Hourly sums of a whole month are generated as settling would have left them: organizations of all
sizes, the largest without a quiet hour. Single requests are settled by the real code, sealed, and
archived; they are fewer than a month's, and figures are per request.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import msgspec
from sqlalchemy import Connection, Engine, make_url, text

from app.billing.archiving import archive_before
from app.billing.posting import post_settlements
from app.billing.prices import FIRST_PRICES, Rates
from app.billing.rating import Settlement, rate
from app.billing.seal_check import check_chain
from app.billing.sealing import seal_all
from app.billing.signing import open_key
from app.billing.usage_archive import UsageArchive
from app.console.usage_query import read_query
from app.console.usage_view import read_usage_view
from app.core import clock
from app.core.database import Database, create_writer_engine
from app.core.ids import id_with
from app.core.migration import upgrade
from app.metering.hours import hour_of, period
from app.metering.records import AdmitRecord, Usage
from app.metering.series import SeriesKey
from app.metering.service import read_usage
from app.settings import Settings

NUM_DAYS, NUM_KEYS, NUM_MODELS = 30, 3, 5
DIMENSIONS = ("input", "cached_input", "output", "request", "device_ms")
LOAD_ROWS = 50_000
REPEATS = 15
RATES = Rates("pb_01kb0000000000000000000000", "usd", FIRST_PRICES)


class Organization:
    """The n-th largest of them. `share` of its hours have usage."""

    def __init__(self, place: int, count: int) -> None:
        self.id = f"org_{place:026d}"
        self.weight = 1 / (place + 1)
        self.share = min(1.0, max(0.05, 8 / (place + 1) + 0.3 * (1 - place / count)))
        self.keys = [(f"key_{place:013d}{key:013d}", f"Key {key}") for key in range(NUM_KEYS)]


def series_of(organization: Organization) -> list[list[tuple[SeriesKey, str]]]:
    """By key and model: the series of its dimensions, and the key's name."""
    return [
        [
            (
                SeriesKey(
                    organization.id,
                    key_id,
                    f"model-{model}",
                    1,
                    "standard",
                    dimension,
                    "free" if dimension == "device_ms" else "billed",
                    RATES.book_id,
                    *(
                        (0, 1)  # in the price of tokens
                        if dimension == "device_ms"
                        else msgspec.structs.astuple(RATES.prices[dimension])
                    ),
                ),
                key_name,
            )
            for dimension in DIMENSIONS
        ]
        for key_id, key_name in organization.keys
        for model in range(NUM_MODELS)
    ]


def hour_rows(
    organizations: list[Organization], first: int, chance: random.Random
) -> Iterator[tuple[str, int, int, int, int]]:
    """In the order of time, as they come to be."""
    groups = [
        (organization, [key.id for key, _ in group])
        for organization in organizations
        for group in series_of(organization)
    ]
    for hour in range(first, first + 24 * NUM_DAYS):
        for organization, ids in groups:
            if chance.random() < organization.share:
                for series_id in ids:
                    quantity = chance.randrange(1, 2_000_000)
                    yield series_id, hour, quantity, quantity * 100, quantity


def load(engine: Engine, organizations: list[Organization], first: int) -> int:
    """Returns how many rows were written."""
    chance, count = random.Random(1), 0
    with engine.begin() as connection:
        names = [*SeriesKey.__struct_fields__, "id", "api_key_name"]
        series = [
            {**{name: getattr(key, name) for name in names[:-2]}, "id": key.id, "api_key_name": n}
            for organization in organizations
            for group in series_of(organization)
            for key, n in group
        ]
        values = ", ".join(f":{name}" for name in names)
        insert = f"INSERT INTO usage_series ({', '.join(names)}) VALUES ({values})"  # noqa: S608
        connection.execute(text(f"{insert} ON CONFLICT DO NOTHING"), series)
    rows = hour_rows(organizations, first, chance)
    while True:
        block = [row for _, row in zip(range(LOAD_ROWS), rows, strict=False)]
        if not block:
            return count
        with engine.begin() as connection:
            _insert(connection, block)
        count += len(block)


def _insert(connection: Connection, block: list[tuple[str, int, int, int, int]]) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("INSERT INTO usage_hour VALUES (?, ?, ?, ?, ?)", block)
        return
    cursor = connection.connection.cursor()
    with cursor.copy("COPY usage_hour FROM STDIN") as copy:
        for row in block:
            copy.write_row(row)


def settlement(
    organization: Organization, at_ns: int, number: int, chance: random.Random
) -> Settlement:
    """A chat of usual size."""
    key_id, key_name = chance.choice(organization.keys)
    duration_ns = chance.randrange(200_000_000, 8_000_000_000)
    request_id = id_with("req", at_ns // 1_000_000, chance.randbytes(10))
    admitted = AdmitRecord(
        request_id,
        organization.id,
        key_id,
        key_name,
        f"model-{chance.randrange(NUM_MODELS)}",
        1,
        "/v1/chat/completions",
        "decoder",
        "standard",
        RATES.book_id,
        at_ns + chance.randrange(2_000_000),
    )
    usage = Usage(
        admitted=admitted,
        outcome="completed",
        finish_reason=chance.choice(("stop", "stop", "length")),
        input_tokens=chance.randrange(20, 4_000),
        cached_tokens=chance.choice((0, 16 * chance.randrange(1, 200))),
        output_tokens=chance.randrange(1, 800),
        device_ms=duration_ns // 1_500_000,
        finished_at_ns=admitted.started_at_ns + duration_ns,
        first_token_ns=chance.randrange(20_000_000, 400_000_000),
    )
    return rate(usage, RATES)


def settle(
    engine: Engine, organizations: list[Organization], num_events: int, batch: int, at: datetime
) -> str:
    """Settles so many at 39 a second of the month's time; tells how long it took."""
    chance = random.Random(2)
    weights = [organization.weight for organization in organizations]
    at_ns = int(at.timestamp()) * 1_000_000_000
    took = worked = 0.0
    for start in range(0, num_events, batch):
        own = [
            settlement(organization, at_ns + (start + n) * 26_000_000, start + n, chance)
            for n, organization in enumerate(chance.choices(organizations, weights, k=batch))
        ]
        started, before = time.perf_counter(), time.process_time()
        with engine.begin() as connection:
            post_settlements(connection, own)
        took += time.perf_counter() - started
        worked += time.process_time() - before
    return f"{num_events / took:,.0f}/s, {batch} at once, {worked / num_events * 1e6:,.0f} us CPU"


def size_bytes(engine: Engine, tables: tuple[str, ...]) -> int:
    """What these tables take with their indexes."""
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            sizes = (f"pg_total_relation_size('{name}')" for name in tables)
            return int(connection.scalar(text(f"SELECT {' + '.join(sizes)}")) or 0)
        names = ", ".join(f"'{name}'" for name in tables)
        pages = "dbstat d JOIN sqlite_master m ON m.name = d.name"
        query = f"SELECT sum(d.pgsize) FROM {pages} WHERE m.tbl_name IN ({names})"  # noqa: S608
        try:
            return int(connection.scalar(text(query)) or 0)
        except Exception:  # noqa: BLE001 - a build of SQLite without dbstat
            return -1


def forget_cache(path: str) -> None:
    """Lets go of the pages of SQLite's file, as far as this process may."""
    for name in (path, f"{path}-wal"):
        if Path(name).exists():
            descriptor = os.open(name, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


async def timed(database: Database, question: Callable[[], Awaitable[object]]) -> str:
    """Milliseconds: the first on a new connection without cached pages, the usual, and how much of
    that is this process's own work, whatever else runs beside it."""
    await database.engine.dispose()
    if database.engine.dialect.name == "sqlite":
        forget_cache(str(database.engine.url.database))
    took: list[float] = []
    worked: list[float] = []
    for _ in range(REPEATS):
        started, before = time.perf_counter(), time.process_time()
        await question()
        took.append((time.perf_counter() - started) * 1e3)
        worked.append((time.process_time() - before) * 1e3)
    usual = took[1:]
    warm = f"{statistics.median(usual):.0f} ({min(usual):.0f}-{max(usual):.0f})"
    return f"{took[0]:.0f} | {warm} | {statistics.median(worked[1:]):.0f}"


async def ask(url: str, organizations: list[Organization], now: datetime) -> None:
    """Every kind of question that a page or the API asks."""
    database = Database(url)
    print(
        "\n| asked | organization | cold, ms | warm, ms (range) | CPU, ms |\n|---|---|---|---|---|"
    )
    middle = organizations[len(organizations) // 2]
    for name, organization in (("largest", organizations[0]), ("middle", middle)):
        for days in ("7d", "30d", "90d"):

            async def page(days: str = days, owner: str = organization.id) -> None:
                async with database.read() as session:
                    await read_usage_view(session, owner, read_query({"period": days}), "usd")

            figures = await timed(database, page)
            print(f"| page Usage, {days} | {name} | {figures} |", flush=True)
        for group in ("model", "key", "class", "dimension", "day", "hour"):

            async def answer(group: str = group, owner: str = organization.id) -> None:
                within = period(now - timedelta(days=30), now)
                async with database.read() as session:
                    cells = await read_usage(session, owner, within, group)  # type: ignore[arg-type]
                    cells.rows(group)  # type: ignore[arg-type]

            figures = await timed(database, answer)
            print(f"| API, 30 days by {group} | {name} | {figures} |", flush=True)
    await database.close()


def archive(engine: Engine, directory: Path, num_events: int, before: datetime) -> None:
    """Seals, verifies and archives what was settled."""
    key = open_key(directory / "receipts.key")
    files = UsageArchive(directory / "archive")
    started = time.perf_counter()
    count = seal_all(engine, key)
    took = time.perf_counter() - started
    print(f"sealed {count:,} transactions in {took:.1f} s", flush=True)
    started = time.perf_counter()
    checked = check_chain(engine, files, key.public_hex)
    took = time.perf_counter() - started
    assert checked.problem is None, checked.problem
    print(f"verified {checked.num_receipts:,} receipts in {took:.1f} s", flush=True)
    started = time.perf_counter()
    assert archive_before(engine, files, before) == num_events
    took = time.perf_counter() - started
    size = sum(path.stat().st_size for path in files.directory.iterdir())
    print(
        f"archived {num_events:,} in {took:.1f} s ({num_events / took:,.0f}/s): "
        f"{size / num_events:.1f} bytes per request in {len(files.spans())} files",
        flush=True,
    )
    wanted = [
        transaction.receipts[-1].event_id.removesuffix(":1")
        for span in files.spans()
        for transaction in islice(files.transactions(span), 0, None, 1_000)
    ]
    took_ms: list[float] = []
    for request_id in wanted:
        started = time.process_time()
        assert UsageArchive(files.directory).find(request_id) is not None
        took_ms.append((time.process_time() - started) * 1e3)
    print(f"an archived receipt is found in {statistics.median(took_ms):.0f} ms of CPU", flush=True)


LEDGER = ("ledger_transaction", "ledger_entry", "sealed_transaction", "unsealed_transaction")
DETAIL = ("usage_event", "usage_line")
SUMS = ("usage_hour", "usage_series")


def measure(url: str, directory: Path, options: argparse.Namespace) -> None:
    settings = Settings(database_url=url)
    engine = create_writer_engine(settings.sync_database_url)
    upgrade(engine)
    organizations = [Organization(n, options.organizations) for n in range(options.organizations)]
    now = clock.now()
    month = (now - timedelta(days=NUM_DAYS)).replace(minute=0, second=0, microsecond=0)
    batch = options.batch
    num_events = options.events // (10 * batch) * 10 * batch
    started = datetime.now(UTC)
    empty = settle(engine, organizations, num_events // 10, batch, now - timedelta(hours=2))
    print(f"settled {empty}, into an empty database")
    count = load(engine, organizations, hour_of(month))
    per_row = size_bytes(engine, SUMS) / max(1, count)
    print(
        f"{count:,} hourly sums of {options.organizations} organizations, "
        f"{count * per_row / 1e6:,.0f} MB, {per_row:.0f} bytes each "
        f"(made in {datetime.now(UTC) - started})",
        flush=True,
    )
    asyncio.run(ask(settings.async_database_url, organizations, now))
    took = settle(engine, organizations, num_events, batch, now - timedelta(hours=1))
    total = num_events + num_events // 10
    with engine.connect() as connection:
        transactions = connection.scalar(text("SELECT count(*) FROM ledger_transaction")) or 1
    print(
        f"\nsettled {took}, beside the month; "
        f"{size_bytes(engine, DETAIL) / total:,.0f} bytes per request with its lines, "
        f"{size_bytes(engine, LEDGER) / transactions:,.0f} per ledger transaction "
        f"({total / transactions:.2f} requests each)",
        flush=True,
    )
    archive(engine, directory, total, now + timedelta(days=3))
    engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--organizations", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--database-url", default="", help="an empty PostgreSQL database")
    options = parser.parse_args()
    print(f"{sys.version.split()[0]}, load {os.getloadavg()}")
    with tempfile.TemporaryDirectory() as directory:
        url = options.database_url or f"sqlite:///{directory}/month.db"
        print(make_url(url).get_backend_name())
        measure(url, Path(directory), options)
    print(f"load {os.getloadavg()}")


if __name__ == "__main__":
    main()
