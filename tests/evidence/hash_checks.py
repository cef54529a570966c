"""Receipts, transactions and seals hashed a second time, by code of its own."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator

from tests.evidence.books import Books, Row, instant_text

EVENT = (
    *("organization_id", "api_key_id", "api_key_name", "endpoint_name", "version_number", "route"),
    *("service_class", "outcome", "finish_reason", "price_book_id", "currency", "amount_nano"),
)
LINE = ("dimension", "quantity", "price_nano", "unit_scale", "amount_nano", "disposition")
TRANSACTION = ("id", "idempotency_key", "kind", "organization_id", "currency", "content_sha256")


def content_covers_the_receipts(books: Books) -> Iterator[str]:
    for transaction_id, events in books.events.items():
        transaction = books.transactions.get(transaction_id)
        if transaction is None or not transaction["content_sha256"]:
            continue
        leaves = [_receipt(event, books) for event in sorted(events, key=lambda row: row["id"])]
        if merkle_root(leaves).hex() != transaction["content_sha256"]:
            yield f"{transaction_id}: its receipts are not what it was hashed over"


def seals_chain(books: Books) -> Iterator[str]:
    unsealed = {row["ledger_transaction_id"] for row in books.rows["unsealed_transaction"]}
    sealed = {row["ledger_transaction_id"] for row in books.rows["sealed_transaction"]}
    if both := unsealed & sealed:
        yield f"sealed and still to be sealed: {both}"
    if (unsealed | sealed) != books.transactions.keys():
        yield f"in no seal and in no queue: {books.transactions.keys() ^ (unsealed | sealed)}"
    leaves: dict[int, dict[int, str]] = defaultdict(dict)
    for row in books.rows["sealed_transaction"]:
        leaves[row["seal_number"]][row["position"]] = row["ledger_transaction_id"]
    previous: Row | None = None
    for seal in sorted(books.rows["seal"], key=lambda row: row["number"]):
        ids = leaves.pop(seal["number"], {})
        if sorted(ids) != list(range(len(ids))) or len(ids) != seal["num_transactions"]:
            yield f"seal {seal['number']} lacks some of its transactions"
        root = merkle_root([_transaction(ids[at], books) for at in sorted(ids)]).hex()
        if root != seal["root_sha256"]:
            yield f"seal {seal['number']} is not over what it covers"
        if previous and seal["previous_sha256"] != previous["sha256"]:
            yield f"seal {seal['number']} does not follow seal {previous['number']}"
        if previous and seal["number"] != previous["number"] + 1:
            yield f"seal {seal['number']} follows {previous['number']}"
        previous = seal
    if leaves:
        yield f"transactions in seals that are not: {leaves}"


def _receipt(event: Row, books: Books) -> bytes:
    lines = sorted(books.lines[event["id"]], key=lambda line: line["dimension"])
    return _json(
        {
            "event_id": event["id"],
            **{name: event[name] for name in EVENT},
            "started_at": instant_text(event["started_at"]),
            "finished_at": instant_text(event["finished_at"]),
            "duration_ns": event["duration_ns"],
            "first_token_ns": event["first_token_ns"],
            "lines": [[line[name] for name in LINE] for line in lines],
        }
    )


def _transaction(transaction_id: str, books: Books) -> bytes:
    row = books.transactions[transaction_id]
    return _json(
        {
            **{name: row[name] for name in TRANSACTION},
            "created_at": instant_text(row["created_at"]),
            "entries": [list(item) for item in sorted(books.entries[transaction_id].items())],
        }
    )


def merkle_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, built level by level: the last of an odd level moves up as it is."""
    level = [hashlib.sha256(b"\x00" + leaf).digest() for leaf in leaves]
    if not level:
        return hashlib.sha256().digest()
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        above = [hashlib.sha256(b"\x01" + left + right).digest() for left, right in pairs]
        level = above + level[len(level) - len(level) % 2 :]
    return level[0]


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
