"""The comparison itself finds each way in which books can be wrong, and counts it as what it is."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, create_engine

from tests.evidence.seen import Totals, compare

LOG = """life 2
ask req_whole 8
ask req_left 8
got req_whole 3
got req_left 1
got req_whole 5
end req_whole 5
paid 1:1 100
failed req_left
ask req_row 0
ask req_caught 8
answered req_row 2
got req_caught 4
life 1
ask req_refused 8
failed req_refused
refunded 1:2 40
"""
TABLES = (
    "usage_event (id, request_id, ledger_transaction_id, amount_nano)",
    "usage_line (event_id, dimension, quantity, disposition)",
    "ledger_transaction (id, idempotency_key, kind)",
    "ledger_entry (transaction_id, account, amount_nano)",
)


class Ledger:
    """Only what the comparison reads. Each token and millisecond costs one nano-unit."""

    def __init__(self, connection: Connection) -> None:
        self.run = connection.exec_driver_sql

    def make(self) -> None:
        for table in TABLES:
            self.run(f"CREATE TABLE {table}")

    def request(self, name: str, dimension: str, quantity: int, *, attempt: int = 1) -> None:
        event, posting = f"{name}:{attempt}", f"lt_{name}_{attempt}"
        self.run("INSERT INTO usage_event VALUES (?, ?, ?, ?)", (event, name, posting, quantity))
        line = (event, dimension, quantity, "billed")
        self.run("INSERT INTO usage_line VALUES (?, ?, ?, ?)", line)
        self.post(posting, f"usage:{posting}", "usage", "revenue", quantity)

    def post(self, id: str, key: str, kind: str, account: str, amount_nano: int) -> None:
        self.run("INSERT INTO ledger_transaction VALUES (?, ?, ?)", (id, key, kind))
        for name, nano in ((account, amount_nano), ("customer:org", -amount_nano)):
            self.run("INSERT INTO ledger_entry VALUES (?, ?, ?)", (id, name, nano))


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Engine]:
    """Books that are right."""
    (tmp_path / "seen.log").write_text(LOG)
    engine = create_engine(f"sqlite:///{tmp_path / 'books.db'}")
    with engine.begin() as connection:
        ledger = Ledger(connection)
        ledger.make()
        ledger.request("req_whole", "output", 5)
        ledger.request("req_left", "output", 1)
        ledger.request("req_row", "device_ms", 2)
        ledger.request("req_caught", "output", 6)  # two tokens were on their way
        ledger.post("lt_1", "credit:1:1", "credit", "stripe_clearing", -100)
        ledger.post("lt_2", "refund:1:2", "refund", "stripe_clearing", 40)
    yield engine
    engine.dispose()


def kinds(totals: Totals) -> dict[str, int]:
    names = ("lost", "doubled", "undelivered")
    return {name: getattr(totals, name) for name in names if getattr(totals, name)}


def test_books_that_are_right(source: Engine, tmp_path: Path) -> None:
    totals, problems = compare(tmp_path / "seen.log", source)
    assert problems == []
    assert kinds(totals) == {}
    assert (totals.requests, totals.delivered_tokens, totals.recorded_tokens) == (5, 10, 12)
    assert totals.caught_tokens == 2


Change = Callable[[Ledger], object]


def more(request: str, quantity: int) -> Change:
    """Charged for so much more, in its line, its event and the ledger alike."""

    def change(ledger: Ledger) -> None:
        for statement in (
            "UPDATE usage_line SET quantity = quantity + ? WHERE event_id = ? || ':1'",
            "UPDATE usage_event SET amount_nano = amount_nano + ? WHERE request_id = ?",
            "UPDATE ledger_entry SET amount_nano = amount_nano + ?"
            " WHERE account = 'revenue' AND transaction_id = 'lt_' || ? || '_1'",
        ):
            assert ledger.run(statement, (quantity, request)).rowcount == 1

    return change


def sql(statement: str) -> Change:
    return lambda ledger: ledger.run(statement)


CASES: dict[str, tuple[str, Change]] = {
    "a whole answer, charged twice in one line": ("doubled", more("req_whole", 5)),
    "a row's time, charged twice": ("doubled", more("req_row", 2)),
    "a request that was caught, beyond what it asked for": ("doubled", more("req_caught", 3)),
    "one payment, credited twice over": (
        "doubled",
        sql("UPDATE ledger_entry SET amount_nano = 2 * amount_nano WHERE transaction_id = 'lt_1'"),
    ),
    "a posting of requests that are another's": (
        "doubled",
        lambda ledger: ledger.post("lt_again", "usage:again", "usage", "revenue", 5),
    ),
    "a failed stream, charged for what nobody got": ("undelivered", more("req_left", 1)),
    "a refused request": ("undelivered", lambda ledger: ledger.request("req_refused", "output", 1)),
    "a request of nobody": ("undelivered", lambda ledger: ledger.request("req_x", "output", 1)),
    "a token that is not charged": ("lost", more("req_whole", -1)),
    "a millisecond that is not charged": ("lost", more("req_row", -1)),
    "a token that is not on record": ("lost", more("req_caught", -3)),
    "a refund that was not made": (
        "lost",
        sql("UPDATE ledger_transaction SET idempotency_key = 'other' WHERE id = 'lt_2'"),
    ),
    "a request that no posting charges": (
        "lost",
        sql("UPDATE ledger_transaction SET kind = 'other' WHERE id = 'lt_req_left_1'"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_books_that_are_wrong(source: Engine, tmp_path: Path, name: str) -> None:
    kind, change = CASES[name]
    with source.begin() as connection:
        change(Ledger(connection))
    totals, problems = compare(tmp_path / "seen.log", source)
    assert kinds(totals) == {kind: 1}, problems
    assert len(problems) == 1


def test_a_second_charge_of_one_request(source: Engine, tmp_path: Path) -> None:
    """Under another attempt's number, as settling twice would make it."""
    with source.begin() as connection:
        Ledger(connection).request("req_whole", "output", 5, attempt=2)
    totals, problems = compare(tmp_path / "seen.log", source)
    assert kinds(totals) == {"doubled": 2}  # by the events, and by what it got
    assert "req_whole is on record 2 times" in problems


def test_more_under_way_than_there_are_clients(source: Engine, tmp_path: Path) -> None:
    """Or what was over could pass for caught."""
    log = tmp_path / "seen.log"
    log.write_text(LOG + "ask req_a 8\nask req_b 8\n")
    totals, problems = compare(log, source)
    assert kinds(totals) == {}
    assert problems == ["life 2: 2 requests of 1 clients had no end"]
