"""A thousand requests at once on one dollar: exactly what fits is admitted, nothing more is spent.

On SQLite by the one process that may write there, on PostgreSQL by four.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from tests.evidence.invariants import require_sound
from tests.evidence.spending import DOLLAR, KEYS, Share, prepare

NUM_REQUESTS = 1_000


def spend(directory: Path, url: str, **options: int | bool) -> dict[str, str]:
    """What each request was told: `ok`, or the refusal's code and text."""
    num_processes = 1 if url.startswith("sqlite") else 4
    processes = []
    for i in range(num_processes):
        share = Share(
            url=url,
            journal_id=f"jnl_{i}",
            first=i * NUM_REQUESTS // num_processes,
            num_requests=NUM_REQUESTS // num_processes,
            path=str(directory / f"told{i}"),
            **options,
        )
        processes.append(
            subprocess.Popen([sys.executable, "-m", "tests.evidence.spending", share.as_argument()])
        )
    assert [process.wait(120) for process in processes] == [0] * num_processes
    told: dict[str, str] = {}
    for i in range(num_processes):
        lines = (directory / f"told{i}").read_text().splitlines()
        told |= dict(line.split(" ", 1) for line in lines)
    assert len(told) == NUM_REQUESTS
    return told


@pytest.fixture
def reader(database_url: str) -> Iterator[Engine]:
    engine = create_engine(make_url(database_url))
    yield engine
    engine.dispose()


def sums(engine: Engine) -> tuple[int, int, int]:
    """Posted, held, and how many requests are on record."""
    with engine.begin() as connection:
        row = connection.execute(text("SELECT posted_nano, held_nano FROM account_balance")).one()
        events = connection.execute(text("SELECT count(*) FROM usage_event")).scalar_one()
    return row[0], row[1], events


@pytest.mark.parametrize("price_nano", [7_000_000, 333_333_333])
def test_holds_alone_admit_exactly_what_the_balance_covers(
    tmp_path: Path, database_url: str, reader: Engine, price_nano: int
) -> None:
    """None of them ends, so nothing is freed: as many are admitted as fit into the dollar."""
    asyncio.run(prepare(database_url))
    told = spend(tmp_path, database_url, price_nano=price_nano, is_settled=False)
    admitted = [name for name, answer in told.items() if answer == "ok"]
    assert len(admitted) == min(NUM_REQUESTS, DOLLAR // price_nano)
    posted, held, _ = sums(reader)
    assert (posted, held) == (DOLLAR, len(admitted) * price_nano)
    require_sound(reader)


def test_each_costs_what_was_held_and_the_dollar_is_spent_to_the_last_that_fits(
    tmp_path: Path, database_url: str, reader: Engine
) -> None:
    asyncio.run(prepare(database_url))
    price_nano = 3_000_000
    told = spend(tmp_path, database_url, price_nano=price_nano, is_settled=True)
    admitted = [name for name, answer in told.items() if answer == "ok"]
    assert len(admitted) == DOLLAR // price_nano
    assert sums(reader) == (DOLLAR - len(admitted) * price_nano, 0, len(admitted))
    refused = next(answer for answer in told.values() if answer != "ok")
    assert refused.startswith("balance_too_low")
    assert "prepaid balance" in refused
    assert "is missing" in refused
    require_sound(reader)


def test_nested_budgets_admit_no_more_than_the_narrowest(
    tmp_path: Path, database_url: str, reader: Engine
) -> None:
    """Four keys of $0.05 a day, one model of $0.12 a day, under an organization's $0.15 a month."""
    asyncio.run(prepare(database_url, has_budgets=True))
    price_nano = 1_000_000
    told = spend(tmp_path, database_url, price_nano=price_nano, is_settled=True)
    admitted = [name for name, answer in told.items() if answer == "ok"]
    assert len(admitted) == 150
    refusals = [answer for answer in told.values() if answer != "ok"]
    assert {answer.split(" ")[0] for answer in refusals} == {"budget_reached"}
    assert all("budget of" in answer and "is missing" in answer for answer in refusals)
    with reader.begin() as connection:
        rows = connection.execute(
            text(
                "SELECT b.scope, w.posted_nano, w.held_nano, w.limit_nano FROM budget_window w"
                " JOIN budget b ON b.id = w.budget_id"
            )
        ).all()
        by_key = connection.execute(
            text("SELECT api_key_id, count(*) FROM usage_event GROUP BY api_key_id")
        ).all()
    assert all(posted <= limit and held == 0 for _, posted, held, limit in rows)
    assert {posted for scope, posted, _, _ in rows if scope == "organization"} == {150_000_000}
    assert sum(posted for scope, posted, _, _ in rows if scope == "key") == 150_000_000
    assert {key for key, _ in by_key} <= set(KEYS)
    assert all(count <= 50 for _, count in by_key)
    require_sound(reader)


def test_half_the_hold_is_spent_so_more_follow_and_still_nothing_is_overspent(
    tmp_path: Path, database_url: str, reader: Engine
) -> None:
    """Settlements free money while others ask: the sum stays within the dollar all the same."""
    asyncio.run(prepare(database_url))
    price_nano = 10_000_000
    told = spend(tmp_path, database_url, price_nano=price_nano, is_settled=True, share_percent=50)
    num_admitted = sum(answer == "ok" for answer in told.values())
    posted, held, num_events = sums(reader)
    assert (held, num_events) == (0, num_admitted)
    assert posted == DOLLAR - num_admitted * price_nano // 2 >= 0
    assert num_admitted >= DOLLAR // price_nano
    require_sound(reader)
