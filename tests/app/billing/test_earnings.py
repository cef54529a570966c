"""Earnings, costs and suggested prices, against figures that were computed by hand."""

from datetime import UTC, datetime, timedelta

import pytest

from app.billing.accounts import AccountWriter
from app.billing.costs import cost_of, device_hour_nano, parse_hour, set_device_hour
from app.billing.earnings import (
    Earnings,
    Question,
    Suggestion,
    Target,
    Use,
    earnings,
    read_uses,
)
from app.billing.prices import Book, Item, draft_book
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest

DOLLAR = 10**9
START = datetime(2026, 11, 1, tzinfo=UTC)
END = START + timedelta(hours=10)


def item(dimension: str, price_nano: int, unit_scale: int = 10**6, **values: str) -> Item:
    return Item(
        **{
            "endpoint_name": "*",
            "service_class": "standard",
            "dimension": dimension,
            "price_nano": price_nano,
            "unit_scale": unit_scale,
            **values,
        }
    )


# $0.10 in, $0.01 cached, $0.40 out per million; batch at half of it for output; $1 an hour.
BOOK = draft_book(
    [
        item("input", 100_000_000),
        item("cached_input", 10_000_000),
        item("output", 400_000_000),
        item("output", 200_000_000, service_class="batch"),
        item("device_ms", DOLLAR, 3_600_000),
    ],
    "usd",
    START,
)


def use(
    dimension: str,
    quantity: int,
    amount_nano: int = 0,
    *,
    price: tuple[int, int] = (0, 1),
    disposition: str = "billed",
    model: str = "tiny",
    service_class: str = "standard",
) -> Use:
    return Use(model, service_class, dimension, disposition, *price, quantity, amount_nano)


# 3 M in ($0.30), 7 M cached ($0.07), 2 M out ($0.80), 1 M out of failed requests (waived, $0.40),
# and half an hour of device time, all of it free of charge by itself.
TINY = [
    use("input", 3_000_000, 300_000_000, price=(100_000_000, 10**6)),
    use("cached_input", 7_000_000, 70_000_000, price=(10_000_000, 10**6)),
    use("output", 2_000_000, 800_000_000, price=(400_000_000, 10**6)),
    use("output", 1_000_000, price=(400_000_000, 10**6), disposition="waived"),
    use("request", 190, disposition="free"),
    use("request", 10, disposition="waived"),
    use("device_ms", 1_500_000, disposition="free"),
    use("device_ms", 300_000, disposition="waived"),
]
DIGITS = [
    use("device_ms", 900_000, 250_000_000, price=(DOLLAR, 3_600_000), model="digits"),
    use("request", 50, disposition="free", model="digits"),
]


def ask(uses: list[Use], hour_nano: int | None = 2 * DOLLAR, book: Book = BOOK) -> Earnings:
    question = Question(
        start=START,
        end=END,
        currency="usd",
        device="cuda",
        num_devices=1,
        hour_nano=hour_nano,
        target=Target(utilisation_percent=50, margin_percent=30),
    )
    return earnings(uses, question, book)


def test_a_model_by_hand() -> None:
    """Half an hour at $2 is $1; billed were $1.17."""
    (tiny,) = ask(TINY).models
    assert (tiny.num_requests, tiny.prompt_tokens, tiny.cached_tokens) == (200, 10**7, 7 * 10**6)
    assert (tiny.output_tokens, tiny.device_ms) == (3_000_000, 1_800_000)
    assert tiny.revenue_nano == 1_170_000_000
    assert tiny.waived_nano == 400_000_000
    assert tiny.cost_nano == DOLLAR
    assert tiny.margin_nano == 170_000_000
    assert tiny.cost_per_million_output_nano == 333_333_333  # of 3 M
    assert tiny.cost_per_million_tokens_nano == 76_923_076  # of 13 M


def test_the_box_by_hand() -> None:
    """Ten hours at $2 are $20, of which 45 minutes were used; billed were $1.42."""
    found = ask(TINY + DIGITS)
    assert [model.model for model in found.models] == ["tiny", "digits"]
    assert found.total.revenue_nano == 1_420_000_000
    assert found.total.cost_nano == 1_500_000_000
    assert found.total.margin_nano == -80_000_000
    assert found.box_ms == 36_000_000
    assert found.box_cost_nano == 20 * DOLLAR
    assert found.box_margin_nano == -18_580_000_000
    assert found.used_percent == 7


def test_a_suggested_price_by_hand() -> None:
    """$1 of cost at half the time sold and 30 % margin is to bring $2.60, instead of $1.17: every
    price times 2.6 / 1.17, rounded up."""
    (tiny,) = ask(TINY).models
    suggestion = tiny.suggestion
    assert suggestion.required_nano == 2_600_000_000
    assert suggestion.listed_nano == 1_170_000_000
    prices = {(p.dimension, p.service_class): p.price_nano for p in suggestion.prices}
    assert prices == {
        ("input", "standard"): 222_222_223,
        ("cached_input", "standard"): 22_222_223,
        ("output", "standard"): 888_888_889,
        ("output", "batch"): 444_444_445,
        ("input", "batch"): 222_222_223,
        ("cached_input", "batch"): 22_222_223,
    }
    brought = 3 * 222_222_223 + 7 * 22_222_223 + 2 * 888_888_889
    assert suggestion.required_nano <= brought < suggestion.required_nano + 20


def test_use_at_other_prices_counts_at_those_in_force() -> None:
    """A million output tokens in batch, billed long ago at another price: $0.20 now."""
    uses = [*TINY, use("output", 1_000_000, 5, price=(5, 10**6), service_class="batch")]
    (tiny,) = ask(uses).models
    assert tiny.suggestion.listed_nano == 1_370_000_000


def test_a_device_hour_is_suggested_for_what_is_billed_by_it() -> None:
    uses = [
        use("device_ms", 3_600_000, DOLLAR, price=(DOLLAR, 3_600_000)),
        use("request", 100, disposition="free"),
    ]
    (model,) = ask(uses).models
    (price, _) = model.suggestion.prices
    assert (price.dimension, price.price_nano, price.unit_scale) == (
        "device_ms",
        5_200_000_000,
        3_600_000,
    )


@pytest.mark.parametrize(
    ("uses", "why"),
    [
        ([use("device_ms", 59_999), use("request", 500)], "Too little use"),
        ([use("device_ms", 10**6), use("request", 99)], "Too little use"),
        ([use("device_ms", 10**6, disposition="free"), use("request", 500)], "is free"),
    ],
)
def test_nothing_is_suggested_without_enough_to_go_by(uses: list[Use], why: str) -> None:
    (model,) = ask(uses).models
    assert model.suggestion.prices == []
    assert why in model.suggestion.reason


def test_without_a_price_of_the_hour_there_are_no_costs() -> None:
    found = ask(TINY, hour_nano=None)
    assert found.box_cost_nano is found.box_margin_nano is None
    (tiny,) = found.models
    assert tiny.cost_nano is tiny.margin_nano is tiny.cost_per_million_output_nano is None
    assert tiny.suggestion == Suggestion()
    assert tiny.revenue_nano == 1_170_000_000


def test_costs_are_exact_where_floats_are_not() -> None:
    assert cost_of(3_600_000 * 10**6 + 1, 3 * DOLLAR) == 3 * 10**15 + 833
    assert cost_of(1, 3_599_999) == 0
    assert Target(33, 0).required_nano(1) == 4  # 3.03, rounded up


async def test_the_hour_is_set_and_read(database: Database) -> None:
    async with database.write() as session:
        assert await device_hour_nano(session, "cuda") is None
        await set_device_hour(session, "cuda", parse_hour("$2.50"))
        await set_device_hour(session, "cuda", parse_hour("2.75"))
        assert await device_hour_nano(session, "cuda") == 2_750_000_000
        assert await device_hour_nano(session, "cpu") is None
        with pytest.raises(InvalidRequest, match="0 to a million"):
            await set_device_hour(session, "cuda", -1)
    with pytest.raises(InvalidRequest, match=r"such as 12\.50"):
        parse_hour("much")


async def test_uses_are_those_of_the_hours(
    database: Database, accounts: AccountWriter, settlement: object
) -> None:
    """Of every organization, added up over keys, hours and versions."""
    make = settlement
    for n, organization in enumerate(("org_1", "org_1", "org_2")):
        accounts.settle(make(f"req_{n}", organization_id=organization))  # type: ignore[operator]
    await accounts.flush()
    now = clock.now()
    async with database.read() as session:
        uses = await read_uses(session, now - timedelta(hours=2), now)
        assert await read_uses(session, now - timedelta(hours=9), now - timedelta(hours=4)) == []
    by_dimension = {each.dimension: each for each in uses}
    assert by_dimension["output"].quantity == 3 * 1_000
    assert by_dimension["device_ms"].quantity == 3 * 3
    assert by_dimension["request"].quantity == 3
    assert sum(each.amount_nano for each in uses) == 3 * 410_100
