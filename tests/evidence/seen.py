"""Compares what people saw, by their log, with what the books say after recovery.

Either way: what was delivered is on record, and nothing is charged that nobody got, but for what a
crash caught between the journal and the client.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
from sqlalchemy import Connection, Engine, text

from app.billing.ledger import REVENUE


class Totals(msgspec.Struct):
    """Counts to report. `lost`: delivered and not on record, or paid and not credited; `doubled`:
    on record more often, or with more, than it happened; `undelivered`: charged for what nobody
    got, by a request that was over. None of these may be. Tokens of requests in `waived` were
    delivered, and the crash made them free: recorded, not charged. Those of `caught` were charged
    and on their way when the crash came, of requests that were under way."""

    kills: int = 0
    requests: int = 0
    delivered_tokens: int = 0
    recorded_tokens: int = 0
    waived_tokens: int = 0
    caught_tokens: int = 0
    lost: int = 0
    doubled: int = 0
    undelivered: int = 0

    def __str__(self) -> str:
        fields = msgspec.structs.asdict(self).items()
        return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in fields)


class Request(msgspec.Struct):
    """As its client saw it. `most` is how many tokens it could get, `end` how it ended: with all
    that it `got`, by an error, or with no word, as in a crash."""

    life: int
    most: int
    got: int = 0
    device_ms: int | None = None  # of a prediction
    end: str = ""


class Seen(msgspec.Struct):
    """A log, read. `clients` are the numbers of those that asked, life by life."""

    requests: dict[str, Request] = {}
    clients: list[int] = []
    posted: list[tuple[str, int]] = []  # idempotency key and amount


class Charge(msgspec.Struct, frozen=True):
    """A line of a request."""

    quantity: int = 0
    disposition: str = ""

    @property
    def billed(self) -> int:
        return self.quantity if self.disposition == "billed" else 0


def compare(path: Path, source: Engine) -> tuple[Totals, list[str]]:
    """What the books lack or have too much of, in words."""
    with source.begin() as connection:
        return _Comparison(read_log(path), connection).run()


def read_log(path: Path) -> Seen:
    seen = Seen()
    for line in path.read_text().splitlines() if path.exists() else []:
        what, name, *rest = line.split()
        if what == "life":
            seen.clients.append(int(name))
        elif what == "ask":
            seen.requests[name] = Request(len(seen.clients), int(rest[0]))
        elif what == "got":
            seen.requests[name].got = int(rest[0])
        elif what in ("end", "failed"):
            seen.requests[name].end = what
        elif what == "answered":
            seen.requests[name].end, seen.requests[name].device_ms = what, int(rest[0])
        else:
            kind = {"paid": "credit", "refunded": "refund"}[what]
            seen.posted.append((f"{kind}:{name}", int(rest[0])))
    return seen


class _Comparison:
    """Problems, as they are found, and what they add up to."""

    def __init__(self, seen: Seen, connection: Connection) -> None:
        self._seen = seen
        self._connection = connection
        self._lines = _lines(connection)
        self.totals = Totals(requests=len(seen.requests))
        self.problems: list[str] = []

    def run(self) -> tuple[Totals, list[str]]:
        for request_id, request in self._seen.requests.items():
            self._tokens(request_id, request)
            self._device_ms(request_id, request)
        self._events()
        self._crashes()
        self._postings()
        self._revenue()
        return self.totals, self.problems

    def _found(self, kind: str, words: str) -> None:
        setattr(self.totals, kind, getattr(self.totals, kind) + 1)
        self.problems.append(words)

    def _line(self, request_id: str, dimension: str) -> Charge:
        return self._lines.get((request_id, dimension), Charge())

    def _tokens(self, request_id: str, request: Request) -> None:
        charge, totals = self._line(request_id, "output"), self.totals
        totals.delivered_tokens += request.got
        totals.recorded_tokens += charge.quantity
        totals.waived_tokens += request.got if charge.disposition == "waived" else 0
        words = f"{request_id}: {request.got} tokens delivered, {charge} on record"
        if charge.quantity < request.got:
            self._found("lost", words)
        elif request.end == "end" and charge.billed != request.got:
            self._found("doubled" if charge.billed > request.got else "lost", words)
        elif request.end and charge.billed > request.got:
            self._found("undelivered", words)
        elif charge.billed > request.most:
            self._found("doubled", f"{words}, of {request.most} that were asked for")
        else:
            totals.caught_tokens += max(0, charge.billed - request.got)

    def _device_ms(self, request_id: str, request: Request) -> None:
        charge = self._line(request_id, "device_ms")
        if request.device_ms is None or charge.billed == request.device_ms:
            return
        words = f"{request_id} took {request.device_ms} ms and is charged for {charge}"
        self._found("doubled" if charge.billed > request.device_ms else "lost", words)

    def _events(self) -> None:
        rows = self._connection.exec_driver_sql("SELECT request_id FROM usage_event")
        for request_id, count in Counter(row[0] for row in rows).items():
            if count > 1:
                self._found("doubled", f"{request_id} is on record {count} times")
            if request_id not in self._seen.requests:
                self._found("undelivered", f"{request_id} is on record, and nobody asked for it")

    def _crashes(self) -> None:
        """Nobody asks for two things at once: more than one of each client cannot be under way."""
        under_way = Counter(each.life for each in self._seen.requests.values() if not each.end)
        for life, num_clients in enumerate(self._seen.clients, 1):
            if under_way[life] > num_clients:
                self.problems.append(
                    f"life {life}: {under_way[life]} requests of {num_clients} clients had no end"
                )

    def _postings(self) -> None:
        amounts = _posted_amounts(self._connection)
        for key, amount_nano in self._seen.posted:
            found = amounts.get(key, 0)
            if found != amount_nano:
                words = f"{key} of {amount_nano} is on the ledger with {found}"
                self._found("doubled" if found > amount_nano else "lost", words)

    def _revenue(self) -> None:
        """What the ledger charged is what requests cost, posting by posting."""
        for name, posted_nano, cost_nano in _charged(self._connection):
            if posted_nano != cost_nano:
                words = f"{name} charged {posted_nano} for requests of {cost_nano}"
                self._found("doubled" if posted_nano > cost_nano else "lost", words)


def _lines(connection: Connection) -> dict[tuple[str, str], Charge]:
    """By request and dimension; those of several attempts together."""
    rows = connection.exec_driver_sql(
        "SELECT e.request_id, l.dimension, l.quantity, l.disposition FROM usage_event e"
        " JOIN usage_line l ON l.event_id = e.id"
    )
    lines: dict[tuple[str, str], Charge] = {}
    for request_id, dimension, quantity, disposition in rows:
        before = lines.get((request_id, dimension), Charge())
        is_billed = "billed" in (disposition, before.disposition)
        lines[request_id, dimension] = Charge(
            before.quantity + quantity, "billed" if is_billed else disposition
        )
    return lines


def _posted_amounts(connection: Connection) -> dict[str, int]:
    """What each transaction moves from one side to the other, by idempotency key."""
    rows = connection.exec_driver_sql(
        "SELECT t.idempotency_key, sum(abs(e.amount_nano)) / 2 FROM ledger_transaction t"
        " JOIN ledger_entry e ON e.transaction_id = t.id GROUP BY t.idempotency_key"
    )
    return {row[0]: int(row[1]) for row in rows}


def _charged(connection: Connection) -> Iterator[tuple[str, int, int]]:
    """Each posting of usage with its revenue and what its requests cost."""
    costs: dict[str, int] = defaultdict(int)
    for name, amount_nano in connection.exec_driver_sql(
        "SELECT ledger_transaction_id, amount_nano FROM usage_event"
    ):
        costs[name] += amount_nano
    rows = connection.execute(
        text(
            "SELECT t.id, sum(e.amount_nano) FROM ledger_transaction t"
            " LEFT JOIN ledger_entry e ON e.transaction_id = t.id AND e.account = :revenue"
            " WHERE t.kind = 'usage' GROUP BY t.id"
        ),
        {"revenue": REVENUE},
    )
    posted = {name: int(amount_nano or 0) for name, amount_nano in rows}
    for name in posted.keys() | costs.keys():
        yield name, posted.get(name, 0), costs.get(name, 0)
