"""That the tests of money notice when its code changes; see `mutation.py`."""

import os

import pytest

from tests.evidence.mutation import all_mutants, run, sample
from tests.evidence.simulation import simulate, world

NUM_MUTANTS = int(os.environ.get("QUICK_MUTANTS", "6"))


def test_the_walks_that_mutants_must_survive() -> None:
    with world() as money_class:
        for seed in range(3):
            simulate(money_class, seed, num_steps=60)


# Parts of names of changes that no single process can tell from the code as it is, and why.
EQUIVALENT: dict[str, str] = {
    "credits.py: LtE to Lt in `if amount_nano <= 0:": "nothing is not taken, which is left out",
    "credits.py: `break` left out in `if amount_nano <= 0:": "likewise",
    "credits.py: `await session.flush()` left out": "the transaction's end flushes by itself",
    "`await session.refresh(lot)` left out in `async def take_back(": "is for two processes",
    "`await session.refresh(lot)` left out in `async def expire_due(": "likewise",
    "`await session.refresh(lot)` left out in `async def _post_from_lot(": "nobody reads it then",
    "posting.py: 0 plus one in `missing = ": "accounts that are there are opened again in vain",
    "posting.py: 32 plus one in `transaction_id": "an id of one character more is as good",
    "/holds.py: `_lock(connection, organization_id, currency)` left out": "is for two processes",
    "/holds.py: `_open(connection, organization_id, currency)` left out in `def _lock(": "likewise",
    "/holds.py: `connection.exec_driver_sql(sql.lock_accounts,": "likewise",
    "/holds.py: Gt to GtE in `if amount_nano > MAX_BALANCE_NANO:": "then they are tried one by one",
    "rating.py: 1 plus one in `NO_PRICE = Price(0, 1)`": "nothing a unit is nothing for two",
    "rating.py: 0 plus one in `saved_nano: int = 0`": "whoever rates says what was saved",
    'rating.py: 0 plus one in `return worst_case(rates, "tensor", 0': "has no price for a prompt",
    "rating.py: Gt to GtE in `return slowest_ms": "at the largest size itself the square is one",
    "ledger.py: `await session.flush()` left out": "the next statement flushes by itself",
    "ledger.py: `await session.refresh(account)` left out": "nobody reads the account then",
}


def unexplained(names: list[str]) -> list[str]:
    return [name for name in names if not any(part in name for part in EQUIVALENT)]


@pytest.mark.timeout(600)
def test_a_sample_of_changes_is_noticed() -> None:
    survivors = [mutant.name for mutant in run(sample(NUM_MUTANTS))]
    assert unexplained(survivors) == []


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_every_change_is_noticed() -> None:
    survivors = [mutant.name for mutant in run(all_mutants())]
    assert unexplained(survivors) == []
