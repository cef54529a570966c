"""What is looked at in turn, or only once, is looked at again when it was found: an alarm needs
two comparisons in a row that find the same."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from app.billing.accounts import AccountWriter
from app.billing.rating import Settlement
from app.billing.reconciliation import budgets, usage
from tests.app.billing.reconciliation.conftest import OTHER, Books
from tests.app.billing.reconciliation.test_oracles import IDS, STATE
from tests.app.billing.reconciliation.test_runs import notices

ORPHAN = "UPDATE usage_event SET ledger_transaction_id = 'lt_none' WHERE id = 'req_b0:1'"


async def confirmed(books: Books, name: str, num_runs: int) -> list[Sequence[str]]:
    """What each of the next runs confirms."""
    return [(await books.compare())[name].confirmed for _ in range(num_runs)]


async def test_a_request_without_posting_is_an_alarm_until_it_is_mended(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "NUM_EVENTS", 4)
    await books.sealer.turn()
    await books.compare()  # its turn is next
    transaction_id = await books.scalar(
        "SELECT ledger_transaction_id FROM usage_event WHERE id = 'req_b0:1'"
    )
    await books.spoil(ORPHAN)
    assert await confirmed(books, "orphans", 4) == [[], *[["req_b0:1"]] * 3]
    assert any("Every request is in the ledger" in message for message in await notices(books))
    await books.spoil(ORPHAN.replace("lt_none", transaction_id))
    assert (await books.compare())["orphans"].is_clean


async def test_a_new_process_looks_again_at_what_the_last_one_found(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "NUM_EVENTS", 4)
    monkeypatch.setattr(budgets, "NUM_WINDOWS", 1)
    await books.compare()
    await books.spoil(ORPHAN)
    await books.spoil(
        "UPDATE budget_window SET posted_nano = posted_nano - 1 WHERE budget_id ="
        " (SELECT max(budget_id) FROM budget_window)"
    )
    books.state = msgspec.structs.replace(STATE, settled_ids=[*IDS, "req_gone"])
    found = await books.differing()
    assert {"orphans", "journal", "budgets"} <= set(found)
    books.state = msgspec.structs.replace(STATE, settled_ids=())
    books.reconciler = books.anew()
    checks = await books.compare()
    for name in ("orphans", "journal", "budgets"):
        assert checks[name].confirmed == found[name]


@pytest.mark.parametrize("limit", ["number", "time"])
async def test_many_new_postings_are_looked_at_in_several_runs(
    books: Books,
    accounts: AccountWriter,
    settlement: Callable[..., Settlement],
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
) -> None:
    """A seal may have more of them than one run looks at."""
    for number in range(10):
        accounts.settle(settlement(f"req_c{number}", organization_id=OTHER))
        await accounts.flush()
    await books.sealer.turn()
    num_postings = await books.scalar("SELECT count(*) FROM sealed_transaction")
    assert num_postings > 12
    for number in range(3):  # which no seal has yet
        accounts.settle(settlement(f"req_d{number}", organization_id=OTHER))
        await accounts.flush()
    monkeypatch.setattr(usage, "CHUNK", 1 if limit == "number" else 4)
    if limit == "number":
        monkeypatch.setattr(usage, "MAX_NEW", 4)
    else:
        monkeypatch.setattr(usage, "SECONDS", -1.0)
    seen: list[str] = []
    look = usage.check_transactions

    def noted(connection: Any, ids: Sequence[str], kept_from: Any) -> usage.Finding:
        seen.extend(ids)
        return look(connection, ids, kept_from)

    monkeypatch.setattr(usage, "check_transactions", noted)
    num_runs = 0
    while (run := await books.reconciler.run()).positions["usage"] < 1:
        assert {check.name for check in run.checks if not check.is_clean} == set()
        num_runs += 1
        assert num_runs < 8, "never done"
    last = await books.scalar("SELECT max(ledger_transaction_id) FROM unsealed_transaction")
    await books.compare()
    assert last in seen
    is_sealed = "SELECT count(*) FROM sealed_transaction WHERE ledger_transaction_id = :id"
    sealed = [id for id in seen if await books.scalar(is_sealed, id=id)]
    assert len(sealed) == len(set(sealed)) == num_postings, "each once"


async def test_the_walk_stops_before_what_differs(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it is found again until it is mended, and what comes after it is looked at too."""
    monkeypatch.setattr(usage, "CHUNK", 1)
    await books.sealer.turn()
    first = await books.scalar(
        "SELECT min(ledger_transaction_id) FROM ledger_transaction t JOIN sealed_transaction s"
        " ON s.ledger_transaction_id = t.id WHERE t.kind = 'usage'"
    )
    hashed = "SELECT content_sha256 FROM ledger_transaction WHERE id = :id"
    whole = await books.scalar(hashed, id=first)
    spoilt = "UPDATE ledger_transaction SET content_sha256 = :sha256 WHERE id = :id"
    await books.spoil(spoilt, id=first, sha256="x")
    assert await confirmed(books, "usage", 3) == [[], [first], [first]]
    assert books.reconciler._positions()["usage"] == 0
    await books.spoil(spoilt, id=first, sha256=whole)
    assert (await books.compare())["usage"].is_clean
    assert books.reconciler._positions()["usage"] == 1


async def test_a_settled_request_is_looked_up_until_it_is_found(books: Books) -> None:
    books.state = msgspec.structs.replace(STATE, settled_ids=[*IDS, "req_gone", "req_late"])
    assert await books.differing() == {"journal": ["req_gone", "req_late"]}
    books.state = msgspec.structs.replace(STATE, settled_ids=())
    await books.spoil("UPDATE usage_event SET request_id = 'req_late' WHERE id = 'req_b1:1'")
    assert await confirmed(books, "journal", 3) == [["req_gone"]] * 3
    assert len(await notices(books)) == 1


async def test_a_request_that_waits_too_long_is_no_settled_one(books: Books) -> None:
    books.state = msgspec.structs.replace(STATE, oldest_open="req_old", oldest_open_ms=721_000)
    await books.compare()
    books.state = msgspec.structs.replace(STATE, settled_ids=())
    books.reconciler = books.anew()
    assert await books.differing() == {}


async def test_settled_requests_outlive_a_comparison_that_fails(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    books.state = msgspec.structs.replace(STATE, settled_ids=["req_gone"])
    with monkeypatch.context() as broken:
        broken.setattr(books.reconciler, "_compare_sums", None)
        with pytest.raises(TypeError):
            await books.reconciler.run()
    books.state = msgspec.structs.replace(STATE, settled_ids=())
    assert await books.differing() == {"journal": ["req_gone"]}


async def test_each_of_many_spoilt_budgets_is_an_alarm(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "NUM_WINDOWS", 1)
    await books.spoil(
        "UPDATE budget_window SET posted_nano = posted_nano - 1 WHERE posted_nano > 0"
    )
    runs = await confirmed(books, "budgets", 4)
    assert [len(names) for names in runs] == [0, 1, 2, 2]


async def test_budgets_go_on_where_the_time_was_used_up(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "SECONDS", -1.0)
    notes = [(await books.compare())["budgets"].note for _ in range(2)]
    assert notes == ["1 windows looked at."] * 2
    await books.spoil(
        "UPDATE budget_window SET posted_nano = posted_nano - 1 WHERE posted_nano > 0"
    )
    runs = await confirmed(books, "budgets", 4)
    assert [len(names) for names in runs] == [0, 1, 1, 1]
