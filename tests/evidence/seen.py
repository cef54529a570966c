"""Compares what people saw, by their log, with what the books say after recovery."""

from collections import Counter
from pathlib import Path

import msgspec
from sqlalchemy import Connection, Engine


class Totals(msgspec.Struct):
    """Counts to report. `lost`: delivered and not on record, or paid and not credited; `doubled`:
    on record more often than it happened. Tokens of requests in `waived` were delivered, and the
    crash made them free: recorded, not charged."""

    kills: int = 0
    requests: int = 0
    delivered_tokens: int = 0
    recorded_tokens: int = 0
    waived_tokens: int = 0
    lost: int = 0
    doubled: int = 0

    def __str__(self) -> str:
        fields = msgspec.structs.asdict(self).items()
        return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in fields)


def compare(path: Path, source: Engine) -> tuple[Totals, list[str]]:
    """What the books lack or have too much of, in words."""
    with source.begin() as connection:
        return _compare(path, connection)


def _compare(path: Path, connection: Connection) -> tuple[Totals, list[str]]:
    delivered: dict[str, int] = {}
    ended: dict[str, int] = {}
    answered: dict[str, int] = {}
    posted_keys: list[tuple[str, int]] = []
    totals, problems = Totals(), []
    for line in path.read_text().splitlines() if path.exists() else []:
        what, name, *rest = line.split()
        if what == "ask":
            totals.requests += 1
        elif what == "got":
            delivered[name] = int(rest[0])
        elif what == "end":
            ended[name] = int(rest[0])
        elif what == "answered":
            answered[name] = int(rest[0])
        else:
            posted_keys.append((f"{'credit' if what == 'paid' else 'refund'}:{name}", int(rest[0])))
    lines = _lines(connection)
    counts = Counter(
        row[0] for row in connection.exec_driver_sql("SELECT request_id FROM usage_event")
    )
    totals.doubled += sum(count - 1 for count in counts.values())
    for request_id, num_tokens in delivered.items():
        recorded, disposition = lines.get((request_id, "output"), (0, ""))
        totals.delivered_tokens += num_tokens
        totals.recorded_tokens += recorded
        totals.waived_tokens += num_tokens if disposition == "waived" else 0
        if recorded < num_tokens:
            totals.lost += 1
            problems.append(f"{request_id}: {num_tokens} tokens delivered, {recorded} on record")
    for request_id, num_tokens in ended.items():
        if lines.get((request_id, "output")) != (num_tokens, "billed"):
            problems.append(
                f"{request_id} ended with {num_tokens}: {lines.get((request_id, 'output'))}"
            )
    for request_id, device_ms in answered.items():
        if lines.get((request_id, "device_ms")) != (device_ms, "billed"):
            totals.lost += 1
            problems.append(f"{request_id} took {device_ms} ms and is not charged for them")
    amounts = _posted_amounts(connection)
    for key, amount_nano in posted_keys:
        if amounts.get(key) != amount_nano:
            totals.lost += 1
            problems.append(f"{key} of {amount_nano} is on the ledger with {amounts.get(key)}")
    return totals, problems


def _lines(connection: Connection) -> dict[tuple[str, str], tuple[int, str]]:
    """Quantity and disposition, by request and dimension."""
    rows = connection.exec_driver_sql(
        "SELECT e.request_id, l.dimension, l.quantity, l.disposition FROM usage_event e"
        " JOIN usage_line l ON l.event_id = e.id"
    )
    return {(row[0], row[1]): (row[2], row[3]) for row in rows}


def _posted_amounts(connection: Connection) -> dict[str, int]:
    """What each transaction moves from one side to the other, by idempotency key."""
    rows = connection.exec_driver_sql(
        "SELECT t.idempotency_key, sum(abs(e.amount_nano)) / 2 FROM ledger_transaction t"
        " JOIN ledger_entry e ON e.transaction_id = t.id GROUP BY t.idempotency_key"
    )
    return {row[0]: int(row[1]) for row in rows}
