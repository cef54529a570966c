"""A box with much in it, in SQLite, for measuring pages: models with versions, deployments and
replicas, requests with lines, ledger transactions and hourly sums, invoices, notices and keys.

Half of the usage, all models and keys are of one organization, which operates the box. Rows are
written as the application would have, but for seals and balances, which no page adds up.
"""

import random
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from app.billing.posting import post_settlements
from app.core import clock
from app.core.database import create_writer_engine
from app.core.ids import id_with, new_id
from app.metering.hours import hour_of
from app.metering.series import SeriesKey
from benchmarks.usage_month import RATES, settlement
from benchmarks.usage_month import Organization as Customer
from tests.app.console.samples import DECODER, RECEIPT, TENSOR
from tests.app.whole_app import Tenant

NUM_MODELS, NUM_VERSIONS, NUM_KEYS = 1_000, 200, 200
NUM_ORGANIZATIONS, NUM_INVOICES, NUM_NOTICES, NUM_MEMBERS = 50, 1_000, 500, 100
NUM_DAYS, NUM_LINES, BATCH = 60, 40, 64
DIMENSIONS = ("input", "output", "request", "device_ms", "cached_input")

Row = tuple[Any, ...]


def instant(at: datetime) -> str:
    """As SQLite keeps it."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


def insert(connection: sqlite3.Connection, table: str, names: str, rows: Iterable[Row]) -> None:
    marks = ", ".join("?" * len(names.split(",")))
    connection.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", rows)  # noqa: S608


class Seed:
    """Writes everything into a migrated database that no application uses."""

    def __init__(self, path: Path, tenant: Tenant, num_events: int) -> None:
        self._database = sqlite3.connect(path)
        self._database.execute("PRAGMA synchronous=OFF")
        self._tenant, self._num_events = tenant, num_events
        self._now = clock.now()
        self._chance = random.Random(1)
        self.owners = [tenant.id] + [f"org_{n:026d}" for n in range(1, NUM_ORGANIZATIONS)]
        self.values: dict[str, str] = {}  # of path parameters

    def write(self) -> None:
        for part in (self._people, self._models, self._usage, self._billing):
            started = time.perf_counter()
            with self._database:
                part()
            print(f"{part.__name__[1:]}: {time.perf_counter() - started:.0f} s", flush=True)
        self._database.close()

    def _people(self) -> None:
        at = instant(self._now)
        customers = self.owners[1:]
        rows = [(id, f"Customer {n}", b"salt", 0, at) for n, id in enumerate(customers)]
        insert(
            self._database, "organization", "id, name, cache_salt, is_operator, created_at", rows
        )
        balances = [(id, "usd", -5_000_000_000, 0, 0) for id in customers]
        insert(
            self._database,
            "account_balance",
            "organization_id, currency, posted_nano, held_nano, forced_nano",
            balances,
        )
        keys = [
            (f"key_{n:026d}", self._tenant.id, f"Key {n}", "tp-xxxx", f"{n:064d}", '["read"]', at)
            for n in range(NUM_KEYS)
        ]
        names = "id, organization_id, name, prefix, secret_hash, scopes, created_at"
        insert(self._database, "api_key", names, keys)
        users = [(f"user_{n:026d}", f"person{n}@example.com", "-", at) for n in range(NUM_MEMBERS)]
        insert(self._database, "user", "id, email, password_hash, created_at", users)
        members = [(new_id("mem"), user[0], self._tenant.id, "member", at) for user in users]
        names = "id, user_id, organization_id, role, created_at"
        insert(self._database, "membership", names, members)
        self.values |= {"key_id": keys[0][0], "user_id": users[0][0]}
        self.values["organization_id"] = customers[0]

    def _models(self) -> None:
        models: list[Row] = []
        versions: list[Row] = []
        deployments: list[Row] = []
        revisions: list[Row] = []
        endpoints: list[Row] = []
        replicas: list[Row] = []
        receipt = msgspec.json.encode(RECEIPT).decode()
        owner = self._tenant.id
        for n in range(NUM_MODELS):
            at = instant(self._now - timedelta(minutes=NUM_MODELS - n))
            model, deployment, revision = f"mdl_{n:026d}", f"dep_{n:026d}", f"rev_{n:026d}"
            models.append((model, owner, f"model-{n}", at))
            manifest = msgspec.json.encode(DECODER if n % 2 else TENSOR).decode()
            for number in range(1, 1 + (NUM_VERSIONS if n == NUM_MODELS - 1 else 2)):
                version = f"ver_{n:013d}{number:013d}"
                fixed = (f"model-{n}.pt2", 214_000, "0" * 64, "ready", "", "", 1000, manifest)
                versions.append((version, model, number, "upl", *fixed, receipt, at, at))
            deployments.append((deployment, owner, model, revision, 1, at))
            revisions.append((revision, deployment, 1, version, 1, "{}", at))
            endpoints.append(
                (f"ep_{n:026d}", f"model-{n}", owner, deployment, n % 7 == 0, 0, "", at)
            )
            replicas += [
                (new_id("replica"), deployment, revision, version, status, "It ended.", 0, at)
                for status in ("failed", "stopped", "stopped")
            ]
        for table, names, rows in (
            ("model", "id, organization_id, name, created_at", models),
            (
                "model_version",
                "id, model_id, number, upload_id, filename, upload_bytes, sha256, status, phase, "
                "phase_detail, progress_permille, manifest, receipt, created_at, finished_at",
                versions,
            ),
            (
                "deployment",
                "id, organization_id, model_id, revision_id, is_stopped, created_at",
                deployments,
            ),
            (
                "revision",
                "id, deployment_id, number, version_id, num_replicas, serving, created_at",
                revisions,
            ),
            (
                "endpoint",
                "id, name, organization_id, deployment_id, is_public, is_default, default_note, "
                "created_at",
                endpoints,
            ),
            (
                "replica",
                "id, deployment_id, revision_id, version_id, status, detail, memory_bytes, "
                "created_at",
                replicas,
            ),
        ):
            insert(self._database, table, names, rows)
        self.values |= {"name": f"model-{NUM_MODELS - 1}", "number": str(NUM_VERSIONS)}

    # --- usage ------------------------------------------------------------------------------

    def _usage(self) -> None:
        """Half of the requests are the first organization's. Models are called as often as 1, 1/2,
        1/3 ..., each with keys of its own."""
        first_ns = int((self._now - timedelta(days=NUM_DAYS)).timestamp() * 1e9)
        step_ns = (NUM_DAYS * 86400 * 10**9) // self._num_events
        others = [1 / (n + 1) for n in range(NUM_ORGANIZATIONS - 1)]
        half = sum(others)
        owners = self._chance.choices(self.owners, [half, *others], k=self._num_events)
        ranks = range(NUM_MODELS)
        models = self._chance.choices(ranks, [1 / (n + 1) for n in ranks], k=self._num_events)
        self._series: dict[Row, list[str]] = {}
        self._sums: dict[Row, list[int]] = defaultdict(lambda: [0, 0, 0])
        block: list[Row] = []
        for n, (owner, model) in enumerate(zip(owners, models, strict=True)):
            block.append((owner, model, first_ns + n * step_ns))
            if len(block) == 20_000:
                self._write_block(block)
                block = []
        self._write_block(block)
        self._write_sums()

    def _write_block(self, block: list[Row]) -> None:
        events: list[Row] = []
        lines: list[Row] = []
        by_owner: dict[str, tuple[str, int]] = {}
        transactions: list[Row] = []
        entries: list[Row] = []
        for owner, model, at_ns in block:
            at = datetime.fromtimestamp(at_ns / 1e9, UTC)
            transaction, left = by_owner.get(owner, ("", 0))
            if not left:
                transaction, left = new_id("txn"), BATCH
                moment = instant(at)
                transactions.append(
                    (transaction, transaction, "usage", owner, "usd", "0" * 64, moment)
                )
                for account in (f"customer:{owner}", "revenue:usage"):
                    entries.append((transaction, account, 1, moment))
            by_owner[owner] = (transaction, left - 1)
            events.append(self._event(owner, model, at, at_ns, transaction, lines))
        fields = "id, request_id, ledger_transaction_id, organization_id, api_key_id, api_key_name"
        fields += ", endpoint_name, version_number, route, service_class, outcome, finish_reason"
        fields += ", price_book_id, currency, amount_nano, started_at, finished_at, duration_ns"
        insert(self._database, "usage_event", fields, events)
        fields = "event_id, dimension, quantity, price_nano, unit_scale, amount_nano, disposition"
        insert(self._database, "usage_line", fields, lines)
        fields = "id, idempotency_key, kind, organization_id, currency, content_sha256, created_at"
        insert(self._database, "ledger_transaction", fields, transactions)
        waiting = [row[:1] for row in transactions]
        insert(self._database, "unsealed_transaction", "ledger_transaction_id", waiting)
        fields = "transaction_id, account, amount_nano, created_at"
        insert(self._database, "ledger_entry", fields, entries)

    def _event(
        self, owner: str, model: int, at: datetime, at_ns: int, transaction: str, lines: list[Row]
    ) -> Row:
        chance = self._chance.random
        is_ours = owner == self._tenant.id
        if not is_ours:
            model %= 20
        key = (2 * model + (chance() < 0.3)) % (NUM_KEYS if is_ours else 4)
        request_id = id_with("req", at_ns // 1_000_000, self._chance.randbytes(10))
        quantities = (int(chance() * 4000), int(chance() * 800), 1, int(chance() * 3000), 512)
        hour, total = hour_of(at), 0
        series = self._series_of(owner, f"key_{key:026d}", f"Key {key}", f"model-{model}")
        for index in range(5 if chance() < 0.3 else 4):
            series_id, dimension, price_nano, scale, disposition = series[index]
            quantity = quantities[index]
            amount = quantity * price_nano // scale
            total += amount
            lines.append(
                (f"{request_id}:1", dimension, quantity, price_nano, scale, amount, disposition)
            )
            sums = self._sums[series_id, hour]
            sums[0] += quantity
            sums[1] += amount
            sums[2] += amount if dimension == "cached_input" else 0
        named = (owner, f"key_{key:026d}", f"Key {key}", f"model-{model}", 1)
        what = ("/v1/chat/completions", "standard", "completed", "stop", RATES.book_id, "usd")
        when = (instant(at - timedelta(seconds=1)), instant(at), 1_000_000_000)
        return (f"{request_id}:1", request_id, transaction, *named, *what, total, *when)

    def _series_of(self, owner: str, key: str, key_name: str, model: str) -> list[Any]:
        found = self._series.get((owner, key, model))
        if found is None:
            found = self._series[owner, key, model] = []
            rows: list[Row] = []
            for dimension in DIMENSIONS:
                is_free = dimension == "device_ms"
                price = (0, 1) if is_free else msgspec.structs.astuple(RATES.prices[dimension])
                disposition = "free" if is_free else "billed"
                series = SeriesKey(
                    *(owner, key, model, 1, "standard", dimension, disposition, RATES.book_id),
                    *price,
                )
                rows.append((series.id, key_name, *msgspec.structs.astuple(series)))
                found.append((series.id, dimension, *price, disposition))
            names = "id, api_key_name, " + ", ".join(SeriesKey.__struct_fields__)
            insert(self._database, "usage_series", names, rows)
        return found

    def _write_sums(self) -> None:
        rows = [(*key, *sums) for key, sums in sorted(self._sums.items())]
        insert(
            self._database,
            "usage_hour",
            "series_id, hour, quantity, amount_nano, saved_nano",
            rows,
        )
        print(f"{len(rows):,} hourly sums", flush=True)
        self._sums.clear()

    # --- billing ----------------------------------------------------------------------------

    def _billing(self) -> None:
        invoices: list[Row] = []
        lines: list[Row] = []
        for number in range(1, NUM_INVOICES + 1):
            place = number % NUM_ORGANIZATIONS
            back = number // NUM_ORGANIZATIONS + 1
            year, month = divmod(self._now.year * 12 + self._now.month - 1 - back, 12)
            invoice = f"inv_{number:026d}"
            named = (invoice, number, self.owners[place], f"Customer {place}")
            amounts = (9 * 10**9, 0, 0, 900, 0)
            at = instant(self._now - timedelta(days=30 * back))
            invoices.append((*named, f"{year}-{month + 1:02d}", "paid", "usd", *amounts, "", at))
            lines += [
                (invoice, position, f"model-{position - 1}", "input", "standard",
                 *msgspec.structs.astuple(RATES.prices["input"]), 10**6, 10**8)
                for position in range(1, NUM_LINES + 1)
            ]  # fmt: skip
        names = "id, number, organization_id, organization_name, period, state, currency"
        names += ", usage_nano, credit_nano, carry_in_nano, due_cents, carry_out_nano, error"
        insert(self._database, "invoice", f"{names}, created_at", invoices)
        names = "invoice_id, position, endpoint_name, dimension, service_class, price_nano"
        names += ", unit_scale, quantity, amount_nano"
        insert(self._database, "invoice_line", names, lines)
        notices = [
            (new_id("notice"), self._tenant.id, "test", f"Notice {n}.", "{}",
             instant(self._now - timedelta(minutes=n)), 0, "",
             None if n < 3 else instant(self._now))
            for n in range(NUM_NOTICES)
        ]  # fmt: skip
        names = "id, organization_id, kind, message, data, created_at, num_attempts"
        insert(self._database, "notice", f"{names}, delivery_error, dismissed_at", notices)
        top_ups = [
            (new_id("top"), self._tenant.id, "checkout", "paid", 1000, "usd", 0, 0, "",
             instant(self._now))
            for _ in range(500)
        ]  # fmt: skip
        names = "id, organization_id, kind, state, amount_cents, currency, refunded_cents"
        names += ", disputed_cents, error, created_at"
        insert(self._database, "top_up", names, top_ups)
        self.values |= {
            "invoice_id": f"inv_{NUM_ORGANIZATIONS:026d}",
            "position": "1",
            "top_up_id": top_ups[0][0],
        }


def settle_some(url: str, tenant: Tenant) -> str:
    """A few requests by the real code, as the bulk has no receipts; returns the id of one."""
    customer = Customer(0, 1)
    customer.id, customer.keys = tenant.id, [(tenant.key_id, "Web shop")]
    chance = random.Random(2)
    at_ns = time.time_ns() - 120 * 10**9
    own = [settlement(customer, at_ns + n * 10**7, n, chance) for n in range(BATCH)]
    engine = create_writer_engine(url)
    with engine.begin() as connection:
        post_settlements(connection, own)
    engine.dispose()
    return own[0].request_id
