"""What must be true of the books at every moment, checked from the tables alone.

Reads SQL and shares no code with the application: its sums, hashes and rounding are written here
a second time. `problems` returns a sentence for everything that is wrong.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

from sqlalchemy import Connection, Engine

from tests.evidence.books import SERIES, Books, Row, instant
from tests.evidence.hash_checks import content_covers_the_receipts, seals_chain


def problems(source: Connection | Engine) -> list[str]:
    """Everything that is wrong, in words; nothing when the books are sound."""
    if isinstance(source, Engine):
        with source.begin() as connection:
            return problems(connection)
    if source.dialect.name == "postgresql" and not source.in_transaction():
        source = source.execution_options(isolation_level="REPEATABLE READ")
    books = Books(source)
    return [text for check in CHECKS for text in check(books)]


def require_sound(source: Connection | Engine) -> None:
    found = problems(source)
    assert not found, "\n".join(found[:20])


# --- ledger and accounts ----------------------------------------------------------------------


def transactions_balance(books: Books) -> Iterator[str]:
    for transaction_id, entries in books.entries.items():
        if sum(entries.values()):
            yield f"{transaction_id} does not sum to zero: {entries}"
        if transaction_id not in books.transactions:
            yield f"{transaction_id} has entries and no transaction"
    for row in books.rows["ledger_entry"]:
        transaction = books.transactions.get(row["transaction_id"])
        if transaction and instant(row["created_at"]) != instant(transaction["created_at"]):
            yield f"{row['transaction_id']}: an entry of another time"


def keys_are_unique(books: Books) -> Iterator[str]:
    yield from _twice(
        "idempotency key", (r["idempotency_key"] for r in books.transactions.values())
    )
    yield from _twice("request", (r["request_id"] for r in books.rows["usage_event"]))


def balances_are_sums(books: Books) -> Iterator[str]:
    held: dict[str, int] = defaultdict(int)
    for hold in books.rows["hold"]:
        held[hold["organization_id"]] += hold["amount_nano"]
    organizations: set[str] = set()
    for row in books.rows["account_balance"]:
        name = row["organization_id"]
        organizations.add(name)
        on_ledger = books.on_accounts(f"customer:{name}")
        if row["posted_nano"] != on_ledger:
            yield f"{name}: posted {row['posted_nano']}, but its entries sum to {on_ledger}"
        if row["held_nano"] != held[name]:
            yield f"{name}: held {row['held_nano']}, but its holds sum to {held[name]}"
        yield from _within_limit(row)
    if unknown := held.keys() - organizations:
        yield f"holds without an account: {unknown}"
    customers = {
        account.split(":")[1]
        for entries in books.entries.values()
        for account in entries
        if account.startswith("customer:")
    }
    if unknown := customers - organizations:
        yield f"entries without an account: {unknown}"


def _within_limit(row: Row) -> Iterator[str]:
    """Beyond its limit only as far as a forced debit took it, and forced by no more than that."""
    limit, held, forced = row["credit_limit_nano"], row["held_nano"], row["forced_nano"]
    lacking = 0 if limit is None or held == 0 else max(0, held - row["posted_nano"] - limit)
    if lacking != forced:
        yield f"{row['organization_id']}: lacks {lacking}, forced by {forced}: {row}"


def transactions_name_their_organization(books: Books) -> Iterator[str]:
    """One transaction concerns at most one organization, and says which."""
    for transaction_id, entries in books.entries.items():
        named = {name.split(":")[1] for name in entries if name.startswith("customer:")}
        said = books.transactions[transaction_id]["organization_id"]
        if len(named) > 1 or (said and named - {said}):
            yield f"{transaction_id} of {said!r} moves money of {named}"


# --- credit -----------------------------------------------------------------------------------


def credit_is_what_lots_have_left(books: Books) -> Iterator[str]:
    left: dict[str, int] = defaultdict(int)
    for lot in books.rows["credit_lot"]:
        left[f"customer:{lot['organization_id']}:{lot['kind']}"] += lot["remaining_nano"]
        if not 0 <= lot["remaining_nano"] <= lot["amount_nano"]:
            yield f"{lot['id']} has {lot['remaining_nano']} of {lot['amount_nano']} left"
    accounts = {
        name for entries in books.entries.values() for name in entries if name.count(":") == 2
    }
    for name in accounts | left.keys():
        if books.on_accounts(name) != left[name]:
            yield f"{name}: {books.on_accounts(name)} on the ledger, {left[name]} in lots"


def lots_are_used_as_recorded(books: Books) -> Iterator[str]:
    """A lot began with what its transaction put on the credit account, and every use of it is an
    equal entry of the transaction that used it."""
    lots = {lot["id"]: lot for lot in books.rows["credit_lot"]}
    born = {row["idempotency_key"]: row["id"] for row in books.transactions.values()}
    used: dict[str, int] = defaultdict(int)
    by_entry: dict[tuple[str, str], int] = defaultdict(int)
    for use in books.rows["lot_use"]:
        lot = lots[use["lot_id"]]
        used[use["lot_id"]] += use["amount_nano"]
        account = f"customer:{lot['organization_id']}:{lot['kind']}"
        by_entry[use["ledger_transaction_id"], account] += use["amount_nano"]
    for lot in lots.values():
        transaction_id = born.get(f"credit:{lot['source']}", "")
        account = f"customer:{lot['organization_id']}:{lot['kind']}"
        began = books.entries[transaction_id].get(account, 0)
        if lot["remaining_nano"] != began - used[lot["id"]]:
            yield f"{lot['id']}: began with {began}, used {used[lot['id']]}, has {lot}"
    for transaction_id, entries in books.entries.items():
        for account, amount in entries.items():
            is_credit = account.startswith("customer:") and account.count(":") == 2
            kind = books.transactions[transaction_id]["kind"]
            if is_credit and kind != "credit" and amount != -by_entry[transaction_id, account]:
                yield f"{transaction_id}: {amount} from {account}, but lots say otherwise"


# --- holds and budgets ------------------------------------------------------------------------


def windows_hold_what_holds_say(books: Books) -> Iterator[str]:
    held: dict[tuple[str, str], int] = defaultdict(int)
    holds = {hold["request_id"]: hold for hold in books.rows["hold"]}
    for row in books.rows["hold_window"]:
        held[row["budget_id"], row["starts_on"]] += row["amount_nano"]
        hold = holds.get(row["request_id"])
        if hold is None or hold["amount_nano"] != row["amount_nano"]:
            yield f"a budget counts a hold that is not: {row} {hold}"
    for row in books.rows["budget_window"]:
        expected = held.pop((row["budget_id"], row["starts_on"]), 0)
        if row["held_nano"] != expected:
            yield f"window {row} holds {expected}"
        if row["held_nano"] and row["posted_nano"] + row["held_nano"] > row["limit_nano"]:
            yield f"window {row} is beyond its limit"
    if any(held.values()):
        yield f"holds in windows that are not there: {dict(held)}"


def settled_requests_hold_nothing(books: Books) -> Iterator[str]:
    settled = {row["request_id"] for row in books.rows["usage_event"]}
    for hold in books.rows["hold"]:
        if hold["request_id"] in settled:
            yield f"{hold['request_id']} is settled and still holds {hold['amount_nano']}"


# --- usage ------------------------------------------------------------------------------------


def lines_are_prices_times_quantities(books: Books) -> Iterator[str]:
    for event in books.rows["usage_event"]:
        lines = books.lines[event["id"]]
        if event["amount_nano"] != sum(line["amount_nano"] for line in lines):
            yield f"{event['id']} costs {event['amount_nano']}, but its lines are {lines}"
        for line in lines:
            is_billed = line["disposition"] == "billed"
            exact = Fraction(line["quantity"] * line["price_nano"], line["unit_scale"])
            # `round` of a fraction is half to even.
            if line["amount_nano"] != (round(exact) if is_billed else 0):
                yield f"{event['id']}: {line}"
    if unknown := books.lines.keys() - {row["id"] for row in books.rows["usage_event"]}:
        yield f"lines of no event: {unknown}"


def events_are_what_was_posted(books: Books) -> Iterator[str]:
    """Every event is in one transaction, and each transaction of usage posts its events' sum."""
    for transaction_id, events in books.events.items():
        amount = sum(event["amount_nano"] for event in events)
        transaction = books.transactions.get(transaction_id)
        if transaction is None:
            if amount or transaction_id:
                yield f"{len(events)} events of {amount} in no transaction {transaction_id!r}"
            continue
        if books.entries[transaction_id].get("revenue", 0) != amount:
            yield f"{transaction_id} posts {books.entries[transaction_id]}, its events {amount}"
        if transaction["kind"] != "usage":
            yield f"{transaction_id} with events is a {transaction['kind']}"
        # Older transactions, of one event each, name their organization by its account alone.
        own = transaction["organization_id"] or events[0]["organization_id"]
        if {event["organization_id"] for event in events} != {own}:
            yield f"{transaction_id} has events of another organization"
    for transaction_id, transaction in books.transactions.items():
        is_usage = transaction["kind"] == "usage"
        if is_usage and not books.events[transaction_id]:
            yield f"{transaction_id} posts usage of no event"
        if not is_usage and "revenue" in books.entries[transaction_id]:
            yield f"{transaction_id}, a {transaction['kind']}, moves revenue"
    billed = sum(event["amount_nano"] for event in books.rows["usage_event"])
    if books.on_accounts("revenue") != billed:
        yield f"revenue is {books.on_accounts('revenue')}, but events are {billed}"


def hours_are_sums_of_lines(books: Books) -> Iterator[str]:
    names = {row["id"]: tuple(row[name] for name in SERIES) for row in books.rows["usage_series"]}
    expected: dict[tuple[Any, ...], list[Any]] = defaultdict(lambda: [0, 0, 0])
    for event in books.rows["usage_event"]:
        transaction = books.transactions.get(event["ledger_transaction_id"])
        at = instant(transaction["created_at"] if transaction else event["finished_at"])
        hour = int(at.timestamp()) // 3600
        for line in books.lines[event["id"]]:
            key = tuple((line if name in line else event)[name] for name in SERIES)
            total = expected[*key, hour]
            total[0] += line["quantity"]
            total[1] += line["amount_nano"]
            if transaction and transaction["content_sha256"]:  # older ones did not count it
                saved = _saved_nano(line, books.lines[event["id"]])
                total[2] = None if None in (saved, total[2]) else total[2] + saved
    for row in books.rows["usage_hour"]:
        key = (*names[row["series_id"]], row["hour"])
        found = expected.pop(key, None)
        if found and found[2] is None:
            found[2] = row["saved_nano"]
        if found != [row["quantity"], row["amount_nano"], row["saved_nano"]]:
            yield f"hour {key} says {row}, its lines {found}"
    if expected:
        yield f"lines in no hour: {dict(expected)}"
    for series_id, key in names.items():
        text = json.dumps(key, separators=(",", ":"), ensure_ascii=False)
        if hashlib.sha256(text.encode()).hexdigest()[:32] != series_id:
            yield f"series {series_id} is not named by {key}"


def _saved_nano(line: Row, lines: list[Row]) -> int | None:
    """What cached tokens would have cost more at the input price beside them; may be negative.
    None where the whole prompt was cached, so that no line tells that price."""
    fresh = [each for each in lines if each["dimension"] == "input"]
    if line["dimension"] != "cached_input" or line["disposition"] != "billed":
        return 0
    if not fresh:
        return None
    exact = Fraction(line["quantity"] * fresh[0]["price_nano"], fresh[0]["unit_scale"])
    return round(exact) - int(line["amount_nano"])


# --- invoices ---------------------------------------------------------------------------------


def invoices_are_the_usage_of_their_month(books: Books) -> Iterator[str]:
    for invoice in books.rows["invoice"]:
        name, period = invoice["organization_id"], invoice["period"]
        lines = sum(line["amount_nano"] for line in books.invoice_lines[invoice["id"]])
        if lines != invoice["usage_nano"]:
            yield f"invoice {name} {period}: lines {lines}, usage {invoice['usage_nano']}"
        posted = -sum(
            amount
            for transaction_id, row in books.transactions.items()
            if row["kind"] == "usage" and f"{instant(row['created_at']):%Y-%m}" == period
            for account, amount in books.entries[transaction_id].items()
            if account == f"customer:{name}" or account.startswith(f"customer:{name}:")
        )
        if posted != invoice["usage_nano"]:
            yield f"invoice {name} {period}: usage {invoice['usage_nano']}, ledger {posted}"


def _twice(what: str, values: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            yield f"{what} {value} twice"
        seen.add(value)


CHECKS = (
    transactions_balance,
    keys_are_unique,
    balances_are_sums,
    transactions_name_their_organization,
    credit_is_what_lots_have_left,
    lots_are_used_as_recorded,
    windows_hold_what_holds_say,
    settled_requests_hold_nothing,
    lines_are_prices_times_quantities,
    events_are_what_was_posted,
    hours_are_sums_of_lines,
    content_covers_the_receipts,
    seals_chain,
    invoices_are_the_usage_of_their_month,
)
