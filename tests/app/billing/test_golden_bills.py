"""Bills computed by hand, to the nano-unit. The sums in the comments are what makes them golden:
change them only with the arithmetic."""

from datetime import UTC, datetime
from typing import Any

import pytest

from app.billing.prices import Book, Item, first_items
from app.billing.rating import BILLED, Line, lines_of, rate
from app.core.money import price_of
from app.metering.records import AdmitRecord, Outcome, Usage
from runtime.protocol import Kind, ServiceClass
from tests.app.billing.test_prices import book_of, item

MILLION = 1_000_000
DOLLAR = 1_000_000_000


def bill(
    book: Book,
    *,
    endpoint_name: str = "any",
    service_class: ServiceClass = "standard",
    kind: Kind = "decoder",
    outcome: Outcome = "completed",
    new: int = 0,
    cached: int = 0,
    output: int = 0,
    device_ms: int = 0,
    at: datetime = datetime(2026, 3, 2, 12, tzinfo=UTC),
) -> dict[str, int]:
    """Amounts by dimension and their `total`, of one request."""
    started_at_ns = int(at.timestamp()) * 10**9 + at.microsecond * 1_000
    admitted = AdmitRecord(
        *("req_1", "org_1", "key_1", "key", endpoint_name, 1, "/v1/chat/completions"),
        *(kind, service_class, book.id, started_at_ns, new + cached),
    )
    usage = Usage(
        admitted=admitted,
        outcome=outcome,
        finish_reason="stop",
        input_tokens=new,
        cached_tokens=cached,
        output_tokens=output,
        device_ms=device_ms,
        finished_at_ns=started_at_ns + 1,
        first_token_ns=None,
    )
    settlement = rate(usage, book.rates_of(admitted))
    lines = {line.dimension: line.amount_nano for line in settlement.lines}
    return {**lines, "total": settlement.amount_nano}


def tokens(
    dimension: str,
    dollars_nano: int,
    service_class: str = "standard",
    above_tokens: int = 0,
    **window: int,
) -> Item:
    """A price per million tokens."""
    return item(
        *("*", dimension, service_class, dollars_nano, MILLION, above_tokens),
        **window,
    )


def vendor_list() -> Book:
    """As a public vendor prices a large model, per million tokens: $1.25 in and $10 out, double
    and half as much again above 200,000 tokens of prompt; cached reads a tenth of input, cache
    writes 1.25 times; batch half of all, priority double."""
    items: list[Item] = []
    for service_class, times, over in (("standard", 1, 1), ("priority", 2, 1), ("batch", 1, 2)):
        for above, input_nano, output_nano in (
            (0, 1_250_000_000, 10_000_000_000),
            (200_000, 2_500_000_000, 15_000_000_000),
        ):
            listed = {
                "input": input_nano,
                "cached_input": input_nano // 10,
                "cache_write": input_nano * 5 // 4,
                "output": output_nano,
            }
            items += [
                tokens(name, nano * times // over, service_class, above)
                for name, nano in listed.items()
            ]
    return book_of(*items)


def test_1_the_first_book_of_a_box() -> None:
    """$0.10 in, $0.01 cached, $0.40 out per million; $0.10 per million requests."""
    found = bill(book_of(*first_items()), new=50, cached=1_000, output=200)
    # 50 x 100 = 5,000; 1,000 x 10 = 10,000; 200 x 400 = 80,000; 1 x 100 = 100.
    assert found == {
        "input": 5_000,
        "cached_input": 10_000,
        "output": 80_000,
        "request": 100,
        "total": 95_100,
    }


def test_2_a_vendor_s_list_below_the_threshold() -> None:
    found = bill(vendor_list(), new=150_000, cached=50_000, output=2_000)
    # A prompt of 200,000 is not above 200,000. Input 150,000 x 1,250 = 187,500,000; cached 50,000
    # x 125 = 6,250,000; output 2,000 x 10,000 = 20,000,000: $0.21375.
    assert found["total"] == 187_500_000 + 6_250_000 + 20_000_000 == 213_750_000


def test_3_one_cached_token_more_prices_the_whole_request_higher() -> None:
    found = bill(vendor_list(), new=150_000, cached=50_001, output=2_000)
    # 200,001 tokens: input 150,000 x 2,500 = 375,000,000; cached 50,001 x 250 = 12,500,250;
    # output 2,000 x 15,000 = 30,000,000: $0.41750025.
    assert found["total"] == 375_000_000 + 12_500_250 + 30_000_000 == 417_500_250


def test_4_a_vendor_s_list_in_batch() -> None:
    found = bill(vendor_list(), service_class="batch", new=300_001, output=777)
    # Half of the higher tier: 300,001 x 1,250 = 375,001,250; 777 x 7,500 = 5,827,500.
    assert found["total"] == 375_001_250 + 5_827_500 == 380_828_750


def test_5_a_vendor_s_list_with_priority() -> None:
    found = bill(vendor_list(), service_class="priority", new=10, cached=90, output=1)
    # Double: 10 x 2,500 = 25,000; 90 x 250 = 22,500; 1 x 20,000.
    assert found["total"] == 25_000 + 22_500 + 20_000 == 67_500


def test_6_writing_to_the_cache_at_a_vendor_s_price() -> None:
    rates = vendor_list().rates("any", "standard", 60_000)
    counts = {"cache_write": 48_001, "input": 11_999, "output": 3}
    lines = lines_of(counts, "completed", BILLED["decoder"], rates)
    # 1.25 x $1.25 = $1.5625 per million: 48,001 x 1,562.5 = 75,001,562.5, half to even: ...562;
    # 11,999 x 1,250 = 14,998,750; 3 x 10,000 = 30,000.
    assert [line.amount_nano for line in lines] == [75_001_562, 14_998_750, 30_000]


def off_peak_list() -> Book:
    """$2.19 out per million; between 16:30 and 00:30 UTC a quarter of it: $0.5475."""
    return book_of(
        tokens("output", 2_190_000_000),
        tokens("output", 547_500_000, from_minute=16 * 60 + 30, until_minute=30),
    )


@pytest.mark.parametrize(
    ("hour", "minute", "second", "total"),
    [
        # 10,001 x 2,190 = 21,902,190; 10,001 x 547.5 = 5,475,547.5, half to even: ...548.
        (16, 29, 59, 21_902_190),
        (16, 30, 0, 5_475_548),
        (23, 59, 59, 5_475_548),
        (0, 0, 0, 5_475_548),
        (0, 29, 59, 5_475_548),
        (0, 30, 0, 21_902_190),
    ],
)
def test_7_the_minute_of_admission_decides(hour: int, minute: int, second: int, total: int) -> None:
    at = datetime(2026, 3, 2, hour, minute, second, 999_999 if second else 0, tzinfo=UTC)
    assert bill(off_peak_list(), output=10_001, at=at)["total"] == total


@pytest.mark.parametrize(
    ("quantity", "amount"),
    # At 1 per 2: 0.5, 1.5, 2.5, 3.5 go to the even neighbour; whole numbers stay.
    [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4)],
)
def test_8_a_half_goes_to_the_even_neighbour(quantity: int, amount: int) -> None:
    assert price_of(quantity, 1, 2) == amount
    found = bill(book_of(item(price_nano=1, unit_scale=2)), output=quantity)
    assert found["total"] == amount


def test_9_each_line_is_rounded_once_and_then_added() -> None:
    book = book_of(*(item("*", name, price_nano=1, unit_scale=3) for name in ("input", "output")))
    # 2 / 3 = 0.667 is 1, twice: 2. Added before rounding it would be 1.333, thus 1.
    assert bill(book, new=2, output=2)["total"] == 2
    # 4 / 3 = 1.333 is 1, twice: 2. Added before it would be 2.667, thus 3.
    assert bill(book, new=4, output=4)["total"] == 2


def test_10_the_smallest_price_and_the_largest_count() -> None:
    # $7.5e-9 a token is 7.5 nano-dollars: 75 per 10.
    book = book_of(item(price_nano=75, unit_scale=10))
    assert bill(book, output=1)["total"] == 8  # 7.5, half to even
    assert bill(book, output=3)["total"] == 22  # 22.5, half to even
    # 10^12 tokens: 7.5 x 10^12 nano-dollars, $7,500.
    assert bill(book, output=10**12)["total"] == 7_500 * DOLLAR
    # At $75 per million, 10^12 tokens are 7.5 x 10^16 nano-dollars; the product before the
    # division, 7.5 x 10^22, is past 64 bits.
    assert price_of(10**12, 75 * DOLLAR, MILLION) == 75 * 10**15


def test_11_thirty_days_of_a_kept_prompt() -> None:
    """A million tokens kept for 30 days at $4.50 per million tokens and hour: in token-seconds
    2.592 x 10^12, times 4.5 x 10^9 past 64 bits."""
    book = book_of(item("*", "kv_device", price_nano=4_500_000_000, unit_scale=3_600_000_000))
    token_seconds = MILLION * 30 * 86_400
    assert token_seconds * 4_500_000_000 > 2**63
    rates = book.rates("any", "standard")
    [line] = lines_of({"kv_device": token_seconds}, "completed", BILLED["decoder"], rates)
    # 30 x 24 = 720 hours at $4.50: $3,240.
    assert line.amount_nano == 3_240 * DOLLAR
    # One token-second more is 1.25 nano-dollars: 1.
    [line] = lines_of({"kv_device": token_seconds + 1}, "completed", BILLED["decoder"], rates)
    assert line.amount_nano == 3_240 * DOLLAR + 1


def test_12_a_model_with_prices_of_its_own() -> None:
    book = book_of(
        *first_items(),
        item("dear", "output", "standard", 60 * DOLLAR, MILLION),
        item("dear", "input", "standard", 0, MILLION),
    )
    found = bill(book, endpoint_name="dear", new=123_456, cached=10, output=321)
    # Input 0; cached as for any model, 10 x 10 = 100; output 321 x 60,000 = 19,260,000; 100.
    assert found == {
        "input": 0,
        "cached_input": 100,
        "output": 19_260_000,
        "request": 100,
        "total": 19_260_200,
    }
    # Another model is not touched: 123,456 x 100 + 10 x 10 + 321 x 400 + 100.
    assert bill(book, new=123_456, cached=10, output=321)["total"] == 12_474_200


def test_13_a_price_of_zero_is_billed_as_nothing_and_no_price_is_free() -> None:
    book = book_of(item("*", "input", price_nano=0))
    rates = book.rates("any", "standard")
    lines = lines_of({"input": 5, "output": 7}, "completed", BILLED["decoder"], rates)
    assert lines == [
        Line("input", 5, 0, 1_000_000, 0, "billed"),
        Line("output", 7, 0, 1, 0, "free"),
    ]


@pytest.mark.parametrize(
    ("outcome", "policy", "total"),
    [
        # 1,000 x 100 + 20 x 400 + 100 = 108,100.
        ("cancelled", {}, 108_100),
        ("cancelled", {"cancelled": "waived"}, 0),
        ("cancelled", {"cancelled.output": "waived"}, 100_100),
        ("cancelled", {"cancelled": "waived", "cancelled.input": "billed"}, 100_000),
        ("completed", {"completed.request": "waived"}, 108_000),
        ("failed", {}, 0),
        ("lost", {}, 0),
        ("lost", {"lost": "billed", "lost.request": "waived"}, 108_000),
    ],
)
def test_14_what_is_waived_costs_nothing(
    outcome: Outcome, policy: dict[str, str], total: int
) -> None:
    book = book_of(*first_items(), policy=policy)
    assert bill(book, outcome=outcome, new=1_000, output=20)["total"] == total


def test_15_a_prediction_by_the_hour() -> None:
    book = book_of(
        item("*", "device_ms", price_nano=2_490_000_000, unit_scale=3_600_000),
        item("*", "request", price_nano=50_000),
    )
    # $2.49 per hour: 37 ms x 691.666... = 25,591.666..., thus 25,592. A request at $0.00005 per
    # million is 0.05: 0.
    found = bill(book, kind="tensor", device_ms=37)
    assert found == {"device_ms": 25_592, "request": 0, "total": 25_592}


def test_16_a_decoder_s_device_time_is_in_the_price_of_its_tokens() -> None:
    found = bill(book_of(*first_items()), new=1, output=1, device_ms=3_600_000)
    assert found["device_ms"] == 0
    assert found["total"] == 100 + 400 + 100


def test_17_embeddings_pay_for_input_alone() -> None:
    found = bill(book_of(*first_items()), kind="embedder", new=8_192, device_ms=12)
    assert found["total"] == 819_200 + 100


def test_18_a_threshold_and_a_window_of_one_model() -> None:
    """Of a long prompt at night the threshold decides; a threshold with a window comes first."""
    night: dict[str, Any] = {"from_minute": 0, "until_minute": 360}
    book = book_of(
        tokens("output", 8 * DOLLAR),
        tokens("output", 4 * DOLLAR, **night),
        tokens("output", 12 * DOLLAR, above_tokens=128_000),
    )
    at_night = datetime(2026, 3, 2, 5, 59, tzinfo=UTC)
    # 1,000 x 4,000, then 1,000 x 12,000 (input has no price), then with a night's price of its own.
    assert bill(book, new=128_000, output=1_000, at=at_night)["total"] == 4_000_000
    assert bill(book, new=128_001, output=1_000, at=at_night)["total"] == 12_000_000
    longer = book_of(*book.items, tokens("output", 6 * DOLLAR, above_tokens=128_000, **night))
    assert bill(longer, new=128_001, output=1_000, at=at_night)["total"] == 6_000_000
