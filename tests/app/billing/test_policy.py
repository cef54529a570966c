"""Which outcomes are charged: defaults, overrides, and rules that are refused."""

import pytest

from app.billing.policy import check_policy, disposition, without_defaults
from app.billing.price_changes import change_prices
from app.billing.prices import PriceTable, Rates
from app.billing.rating import rate
from app.core.database import Database
from app.core.errors import InvalidRequest
from tests.app.billing.test_prices import item
from tests.app.billing.test_rating import RATES, usage


def test_by_default_work_is_paid_for_and_faults_are_not() -> None:
    outcomes = ("completed", "cancelled", "failed", "lost", "unheard-of")
    found = [disposition({}, outcome, "output") for outcome in outcomes]
    assert found == ["billed", "billed", "waived", "waived", "waived"]


def test_a_dimension_comes_before_its_outcome() -> None:
    policy = {"cancelled": "waived", "cancelled.input": "billed", "lost.output": "billed"}
    assert disposition(policy, "cancelled", "output") == "waived"
    assert disposition(policy, "cancelled", "input") == "billed"
    assert disposition(policy, "lost", "output") == "billed"
    assert disposition(policy, "lost", "input") == "waived"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"finished": "billed"}, "'finished' is not an outcome"),
        ({"cancelled.tokens": "billed"}, "'cancelled.tokens' is not an outcome"),
        ({"cancelled.": "billed"}, "is not an outcome"),
        ({".output": "billed"}, "is not an outcome"),
        ({"cancelled": "free"}, "must be billed or waived"),
        ({"completed": "waived"}, "cannot be waived as a whole"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(policy: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_policy(policy)


def test_a_policy_has_one_form() -> None:
    assert without_defaults({"failed": "waived", "completed": "billed"}) == {}
    kept = {"completed.request": "waived", "cancelled": "waived", "failed": "waived"}
    assert list(without_defaults(kept)) == ["cancelled", "completed.request"]
    # By dimension even a default says something: its outcome may say otherwise.
    assert without_defaults({"failed.input": "waived"}) == {"failed.input": "waived"}


def test_a_waived_line_keeps_its_quantity_and_price() -> None:
    rates = Rates("pb", "usd", RATES.prices, {"cancelled.output": "waived"})
    settlement = rate(usage(outcome="cancelled", input_tokens=1_000, output_tokens=7), rates)
    lines = {line.dimension: line for line in settlement.lines}
    assert (lines["output"].quantity, lines["output"].price_nano) == (7, 400_000_000)
    assert (lines["output"].amount_nano, lines["output"].disposition) == (0, "waived")
    assert settlement.amount_nano == 100_000 + 100


async def test_a_policy_is_pinned_with_its_book(database: Database) -> None:
    prices = PriceTable(database)
    await prices.start()
    before = prices.rates("tiny", "standard")
    async with database.write() as session:
        await change_prices(session, [item()], "usd", policy={"lost": "billed"})
    again = PriceTable(database)  # reads it from the database
    await again.start()
    assert again.active.policy == {"lost": "billed"}
    assert again.rates("tiny", "standard").policy == {"lost": "billed"}
    pinned = again.book(before.book_id)
    assert pinned is not None
    assert pinned.rates("tiny", "standard").policy == {}
    await prices.close()
    await again.close()
