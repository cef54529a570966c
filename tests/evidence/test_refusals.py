"""That a refusal for money names the limit and what is missing."""

from datetime import UTC, datetime

import pytest

from app.billing import holds
from app.billing.budget_holds import BudgetRefusal, window_starts
from app.billing.holds import HoldRequest, Standing
from app.billing.refusals import refusal_of


def test_the_account_names_its_limit_and_the_shortfall() -> None:
    told = refusal_of(HoldRequest("req", "org", 700), Standing(-400, 100, 1_000, "usd"))
    assert "limit of $0.000001000" in told.message
    assert "$0.000000500 is left" in told.message
    assert "$0.000000200 is missing" in told.message


@pytest.mark.parametrize(
    ("posted", "held", "left"), [(900, 0, 100), (0, 1_500, 0), (400, 100, 500)]
)
def test_a_budget_names_its_limit_and_the_shortfall(posted: int, held: int, left: int) -> None:
    budget = BudgetRefusal("key", "mine", "day", "2026-11-23", 1_000, posted, held, left, "usd")
    told = refusal_of(HoldRequest("req", "org", 600), budget)
    assert told.code == "budget_reached"
    assert "daily budget of the key 'mine', $0.000001000" in told.message
    assert f"$0.{600 - left:09d} is missing" in told.message


def test_windows_begin_with_the_day_and_the_month() -> None:
    at = datetime(2026, 11, 23, 23, 59, tzinfo=UTC)
    assert window_starts("day", at) == "2026-11-23"
    assert window_starts("month", at) == "2026-11-01"


def test_what_is_available_is_never_less_than_nothing() -> None:
    assert Standing(-5, 10, 3, "usd").available_nano == 0
    assert Standing(5, 10, 9, "usd").available_nano == 4
    assert Standing(5, 1, None, "usd").available_nano == 4
    assert Standing(5, 1, None, "usd").room_nano == holds.MAX_BALANCE_NANO + 4
