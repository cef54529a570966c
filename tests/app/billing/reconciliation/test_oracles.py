"""Each check finds the one thing that is wrong, and names it; clean books have no difference."""

import msgspec
import pytest

from app.billing.reconciliation import reconciler
from app.billing.reconciliation.engines import EngineCounts, EngineState
from app.billing.reconciliation.journal import JournalState
from tests.app.billing.conftest import ORGANIZATION
from tests.app.billing.reconciliation.conftest import OTHER, Books

IDS = [f"req_a{n}" for n in range(4)] + ["req_b0", "req_b1"]
STATE = JournalState(num_admitted=7, num_settled=6, num_open=1, settled_ids=IDS)


async def test_clean_books_have_no_difference(books: Books) -> None:
    books.state = STATE
    checks = await books.compare()
    assert {name: check.differences for name, check in checks.items() if check.differences} == {}
    shown = {name: (check.left, check.right) for name, check in checks.items()}
    spent = 5 * 410_100
    assert shown["usage"] == (spent, spent)
    assert shown["hours"] == (spent, spent)
    assert shown["journal"] == (6, 6)
    assert shown["balances"] == (1_900_000 - spent, 1_900_000 - spent)
    assert shown["credit"] == shown["lots"]
    assert shown["credit"][0] == 1_900_000 - 3 * 410_100
    assert shown["holds"] == (777, 777)
    assert shown["windows"] == (2 * 777, 2 * 777)
    assert shown["budgets"] == (2 * 3 * 410_100, 2 * 3 * 410_100)
    assert shown["ledger"][0] == shown["ledger"][1] > 0


# What is spoilt, and which checks must say so by which name (a part of it).
DEFECTS = {
    "an event's amount": (
        "UPDATE usage_event SET amount_nano = amount_nano + 1 WHERE id = 'req_a0:1'",
        {"usage": "req_a0:1", "budgets": "bud_"},
    ),
    "a line's amount": (
        "UPDATE usage_line SET amount_nano = amount_nano + 1"
        " WHERE event_id = 'req_a1:1' AND dimension = 'output'",
        {"usage": "req_a1:1"},
    ),
    "a waived line that costs something": (
        "UPDATE usage_line SET amount_nano = 5"
        " WHERE event_id = 'req_a3:1' AND dimension = 'output'",
        {"usage": "req_a3:1"},
    ),
    "an event without its transaction": (
        "UPDATE usage_event SET ledger_transaction_id = 'lt_none' WHERE id = 'req_b0:1'",
        {"orphans": "req_b0:1", "usage": "lt_"},
    ),
    "an event of somebody else": (
        "UPDATE usage_event SET organization_id = 'org_2' WHERE id = 'req_a0:1'",
        {"usage": "req_a0:1", "budgets": "bud_"},
    ),
    "revenue of usage": (
        "UPDATE ledger_entry SET amount_nano = amount_nano + 1 WHERE account = 'revenue'"
        " AND transaction_id = (SELECT ledger_transaction_id FROM usage_event"
        " WHERE id = 'req_b0:1')",
        {"usage": "lt_", "ledger": "all of usd"},
    ),
    "a customer's entry": (
        "UPDATE ledger_entry SET amount_nano = amount_nano - 9 WHERE account = 'customer:org_2'"
        " AND amount_nano <> 0",
        {"balances": OTHER, "hours": OTHER, "ledger": "lt_"},
    ),
    "an hour of usage": (
        "UPDATE usage_hour SET amount_nano = amount_nano + 1 WHERE amount_nano > 0"
        " AND series_id IN (SELECT id FROM usage_series WHERE organization_id = 'org_2')",
        {"hours": OTHER},
    ),
    "a balance": (
        "UPDATE account_balance SET posted_nano = posted_nano + 1 WHERE organization_id = 'org_1'",
        {"balances": ORGANIZATION},
    ),
    "what a balance holds": (
        "UPDATE account_balance SET held_nano = held_nano + 1 WHERE organization_id = 'org_1'",
        {"holds": ORGANIZATION},
    ),
    "a hold that is gone": (
        "DELETE FROM hold WHERE request_id = 'req_running'",
        {"holds": ORGANIZATION, "windows": "bud_"},
    ),
    "what a budget holds": (
        "UPDATE budget_window SET held_nano = 0",
        {"windows": "bud_"},
    ),
    "what a budget has spent": (
        "UPDATE budget_window SET posted_nano = posted_nano - 1 WHERE posted_nano > 0",
        {"budgets": "bud_"},
    ),
    "what is left of a lot": (
        "UPDATE credit_lot SET remaining_nano = remaining_nano - 1 WHERE remaining_nano > 0",
        {"credit": f"customer:{ORGANIZATION}:", "lots": "lot_"},
    ),
    "a use of a lot": (
        "UPDATE lot_use SET amount_nano = amount_nano + 1",
        {"lots": "lot_"},
    ),
    "a transaction in no seal nor queue": (
        "DELETE FROM unsealed_transaction WHERE ledger_transaction_id ="
        " (SELECT ledger_transaction_id FROM usage_event WHERE id = 'req_b0:1')",
        {"complete": "lt_", "balances": OTHER},
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
async def test_a_defect_is_found_and_named(books: Books, defect: str) -> None:
    assert await books.differing() == {}
    books.reconciler._recounted_at = None  # as a day later
    statement, expected = DEFECTS[defect]
    await books.spoil(statement)
    found = await books.differing()
    for name, part in expected.items():
        assert any(part in named for named in found.get(name, [])), found


async def test_a_request_that_is_settled_but_not_there(books: Books) -> None:
    books.state = msgspec.structs.replace(STATE, settled_ids=[*IDS, "req_gone"])
    assert await books.differing() == {"journal": ["req_gone"]}


async def test_a_request_that_waits_too_long_for_its_settlement(books: Books) -> None:
    books.state = msgspec.structs.replace(STATE, oldest_open="req_old", oldest_open_ms=721_000)
    assert await books.differing() == {"journal": ["req_old"]}
    books.state = msgspec.structs.replace(STATE, oldest_open="req_old", oldest_open_ms=719_000)
    assert await books.differing() == {}


async def test_an_event_that_is_there_twice(books: Books) -> None:
    books.state = STATE
    await books.spoil("UPDATE usage_event SET request_id = 'req_a0' WHERE id = 'req_a1:1'")
    assert (await books.differing())["journal"] == ["req_a0", "req_a1"]


async def test_what_was_changed_after_it_was_added_up_is_found(books: Books) -> None:
    assert await books.differing() == {}
    await books.sealer.turn()
    assert await books.differing() == {}
    await books.spoil(
        "UPDATE ledger_entry SET amount_nano = amount_nano - 9 WHERE account = 'customer:org_2'"
        " AND amount_nano <> 0"
    )
    # At once by its seal, in sums once they are added up anew.
    assert await books.differing() == {"seals": ["after seal 0"]}
    books.reconciler._recounted_at = None
    assert {"balances", "hours", "ledger", "seals"} == set(await books.differing())


async def test_a_receipt_that_was_changed_breaks_its_seal(books: Books) -> None:
    await books.sealer.turn()
    checks = await books.compare()
    assert (checks["seals"].left, checks["seals"].right) == (2, 2)  # once new, once in turn
    await books.spoil("UPDATE usage_event SET api_key_name = 'x' WHERE id = 'req_a0:1'")
    assert await books.differing() == {"seals": ["after seal 0"]}


async def test_a_receipt_is_changed_before_it_is_sealed(books: Books) -> None:
    await books.spoil("UPDATE usage_event SET api_key_name = 'x' WHERE id = 'req_a0:1'")
    (name,) = (await books.differing())["usage"]
    assert name.startswith("lt_")


# --- engines ----------------------------------------------------------------------------

COUNTS = EngineCounts(
    requests=3, prompt_tokens=30, cached_tokens=10, output_tokens=100, device_ns=9 * 10**9
)


def engine(**values: object) -> EngineState:
    made = EngineState(
        id="rep_1 1",
        name="tiny rep_1",
        engine=COUNTS,
        delivered=COUNTS,
        undelivered=EngineCounts(),
        num_failed=0,
        num_runs=50,
        is_resting=True,
    )
    return msgspec.structs.replace(made, **values)


def fewer(**values: int) -> EngineCounts:
    return msgspec.structs.replace(
        COUNTS, **{name: getattr(COUNTS, name) - by for name, by in values.items()}
    )


async def test_an_engine_at_rest_counted_what_was_metered(books: Books) -> None:
    books.engines = [engine()]
    checks = await books.compare()
    shown = {n: (c.left, c.right) for n, c in checks.items() if n.startswith("engine")}
    assert shown == {
        "engine_output_tokens": (100, 100),
        "engine_prompt_tokens": (30, 30),
        "engine_cached_tokens": (10, 10),
        "engine_requests": (3, 3),
        "engine_device": (9_000, 9_000),
    }
    assert await books.differing() == {}


@pytest.mark.parametrize(
    ("field", "by"),
    [
        ("output_tokens", 1),
        ("prompt_tokens", 1),
        ("cached_tokens", 1),
        ("requests", 1),
        ("device_ns", 60_000),
    ],
)
async def test_an_engine_at_rest_that_counted_more_or_less(
    books: Books, field: str, by: int
) -> None:
    name = f"engine_{field.removesuffix('_ns')}"
    for lie in ({"delivered": fewer(**{field: by})}, {"engine": fewer(**{field: by})}):
        books.engines = [engine(**lie)]
        assert await books.differing() == {name: ["tiny rep_1"]}


async def test_what_was_made_and_not_delivered_is_told_and_is_no_difference(books: Books) -> None:
    books.engines = [
        engine(delivered=fewer(output_tokens=4), undelivered=EngineCounts(output_tokens=4)),
        engine(id="2", name="b", delivered=fewer(output_tokens=7), num_failed=1),
    ]
    checks = await books.compare()
    tokens = checks["engine_output_tokens"]
    assert tokens.is_clean
    assert "4 made but not delivered" in tokens.note
    assert "7 made for requests that failed" in tokens.note


async def test_engines_at_work_are_compared_across_two_runs(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counters are a second old and answers are under way, so neither side is ahead for good."""
    monkeypatch.setattr(reconciler, "ENGINES_LATE_NS", 0)
    books.engines = [engine(is_resting=False, engine=fewer(output_tokens=20))]
    assert await books.differing() == {}
    ahead = msgspec.structs.replace(COUNTS, output_tokens=150)
    books.engines = [engine(is_resting=False, engine=ahead, delivered=ahead)]
    assert await books.differing() == {}
    # Now less has arrived than the engine had counted a run ago.
    stuck = msgspec.structs.replace(ahead, output_tokens=149)
    books.engines = [engine(is_resting=False, engine=ahead, delivered=stuck)]
    assert await books.differing() == {"engine_output_tokens": ["tiny rep_1"]}
    # And less is counted than was metered a run ago.
    books.engines = [engine(is_resting=False, engine=fewer(output_tokens=1), delivered=ahead)]
    assert await books.differing() == {"engine_output_tokens": ["tiny rep_1"]}
