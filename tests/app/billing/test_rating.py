"""Golden bills, rounding, and that a hold always covers what is charged."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple

from app.billing.policy import OUTCOMES, check_policy
from app.billing.price_changes import TIERED_DIMENSIONS, check_items
from app.billing.prices import FIRST_PRICES, Book, Price, Rates
from app.billing.rating import (
    BILLED,
    PROMPT_DIMENSIONS,
    Line,
    decoder_worst_case,
    embedder_worst_case,
    held_device_ms,
    lines_of,
    rate,
    slowest_row_ms,
    tensor_worst_case,
    worst_case,
)
from app.metering.records import AdmitRecord, Outcome, Usage
from app.metering.tables import DIMENSIONS
from runtime.protocol import Kind
from tests.app.billing.test_prices import book_of, item

RATES = Rates("pb_1", "usd", FIRST_PRICES)


def usage(
    *,
    kind: Kind = "decoder",
    outcome: Outcome = "completed",
    input_tokens: int = 0,
    cached_tokens: int = 0,
    output_tokens: int = 0,
    device_ms: int = 0,
    num_prompt_tokens: int = 0,
    started_at_ns: int = 0,
) -> Usage:
    admitted = AdmitRecord(
        "req_1", "org_1", "key_1", "test", "tiny", 1, "/v1/completions", kind, "standard", "pb_1",
        started_at_ns, num_prompt_tokens,
    )  # fmt: skip
    return Usage(
        admitted=admitted,
        outcome=outcome,
        finish_reason="stop",
        input_tokens=input_tokens,
        cached_tokens=cached_tokens,
        output_tokens=output_tokens,
        device_ms=device_ms,
        finished_at_ns=1,
        first_token_ns=None,
    )


def test_the_bill_of_a_decoder_request() -> None:
    """$0.10, $0.01 and $0.40 per million: 1,000 + 10,000 + 100,000 tokens by hand."""
    settlement = rate(
        usage(input_tokens=1_000, cached_tokens=10_000, output_tokens=100_000, device_ms=7), RATES
    )
    assert settlement.lines == [
        Line("input", 1_000, 100_000_000, 1_000_000, 100_000, "billed"),
        Line("cached_input", 10_000, 10_000_000, 1_000_000, 100_000, "billed"),
        Line("output", 100_000, 400_000_000, 1_000_000, 40_000_000, "billed"),
        Line("request", 1, 100_000_000, 1_000_000, 100, "billed"),
        Line("device_ms", 7, 0, 1, 0, "free"),
    ]
    assert settlement.amount_nano == 40_200_100
    assert settlement.event_id == "req_1:1"


def test_the_bill_of_a_prediction() -> None:
    """$1 per hour: 9 ms are 2,500 nano-dollars."""
    settlement = rate(usage(kind="tensor", device_ms=9), RATES)
    assert settlement.lines == [
        Line("request", 1, 100_000_000, 1_000_000, 100, "billed"),
        Line("device_ms", 9, 1_000_000_000, 3_600_000, 2_500, "billed"),
    ]


def test_our_faults_cost_nothing_and_stay_visible() -> None:
    for outcome in ("failed", "lost"):
        settlement = rate(usage(outcome=outcome, input_tokens=9, output_tokens=5), RATES)
        assert settlement.amount_nano == 0
        assert [line.quantity for line in settlement.lines] == [9, 5, 1]
        assert {line.disposition for line in settlement.lines} == {"waived"}


def test_a_client_that_left_pays_for_what_was_made() -> None:
    settlement = rate(usage(outcome="cancelled", output_tokens=5), RATES)
    assert settlement.amount_nano == 2_000 + 100


def test_a_dimension_without_a_price_is_free() -> None:
    settlement = rate(usage(input_tokens=5), Rates("pb", "usd", {"request": Price(3, 1)}))
    assert [(line.dimension, line.disposition) for line in settlement.lines] == [
        ("input", "free"),
        ("request", "billed"),
    ]


prices = st.builds(Price, st.integers(0, 10**12), st.integers(1, 10**9))
thresholds = st.sampled_from((0, 1_000, 100_000))
windows = st.sampled_from(((0, 1440), (600, 900), (1380, 120)))


@st.composite
def books(draw: st.DrawFn) -> Book:
    """Any mixture of models, classes, thresholds, windows and rules that is a valid book."""
    keys = st.tuples(
        st.sampled_from(("*", "tiny")),
        st.sampled_from(DIMENSIONS),
        st.sampled_from(("standard", "batch")),
        thresholds,
        windows,
    )
    usual = [("*", name, "standard", 0, (0, 1440)) for name in FIRST_PRICES]
    found = usual + draw(st.lists(keys, max_size=30, unique=True))
    items = [
        item(
            *(name, dimension, service_class, price.price_nano, price.unit_scale),
            *(above if dimension in TIERED_DIMENSIONS else 0, *window),
        )
        for name, dimension, service_class, above, window in found
        for price in [draw(prices)]
    ]
    unique = {(*astuple(each)[:3], *astuple(each)[5:]): each for each in items}
    policy: dict[str, str] = draw(
        st.dictionaries(
            st.one_of(
                st.sampled_from(OUTCOMES),
                st.builds("{}.{}".format, st.sampled_from(OUTCOMES), st.sampled_from(DIMENSIONS)),
            ),
            st.sampled_from(("billed", "waived")),
            max_size=6,
        )
    )
    if policy.get("completed") == "waived":
        del policy["completed"]
    check_items(list(unique.values()))
    check_policy(policy)
    return book_of(*unique.values(), policy=policy)


minutes = st.one_of(
    st.sampled_from((0, 119, 120, 599, 600, 899, 900, 1379, 1380, 1439)), st.integers(0, 1439)
).map(lambda minute: minute * 60 * 10**9)
outcomes = st.sampled_from(OUTCOMES)
shares = st.integers(0, 100)


def looked_up(
    book: Book, name: str, service_class: str, prompt: int, minute: int
) -> dict[str, Price]:
    """The rules of `docs/pricing.md`, one item after another."""
    best: dict[str, tuple[tuple[bool, bool, int, bool], Price]] = {}
    for each in book.items:
        start, end = each.from_minute, each.until_minute
        is_in = start <= minute < end if start < end else not end <= minute < start
        is_ours = each.endpoint_name in ("*", name)
        is_class = each.service_class in ("standard", service_class)
        is_long_enough = prompt > each.above_tokens or each.above_tokens == 0
        if not (is_in and is_ours and is_class and is_long_enough):
            continue
        rank = (
            each.service_class == service_class,
            each.endpoint_name == name,
            each.above_tokens,
            (start, end) != (0, 1440),
        )
        if each.dimension not in best or rank > best[each.dimension][0]:
            best[each.dimension] = (rank, Price(each.price_nano, each.unit_scale))
    return {dimension: price for dimension, (_, price) in best.items()}


@given(
    book=books(),
    started_at_ns=minutes,
    prompt=st.sampled_from((0, 1, 999, 1_000, 1_001, 100_000, 100_001, 10**9)),
    name=st.sampled_from(("tiny", "other")),
    service_class=st.sampled_from(("standard", "priority", "batch")),
)
@settings(max_examples=300)
def test_rates_follow_the_rules_of_look_up(
    book: Book, started_at_ns: int, prompt: int, name: str, service_class: str
) -> None:
    minute = started_at_ns // (60 * 10**9)
    wanted = looked_up(book, name, service_class, prompt, minute)
    assert book.rates(name, service_class, prompt, started_at_ns).prices == wanted
    days_later = started_at_ns + 20_000 * 86_400 * 10**9
    assert book.rates(name, service_class, prompt, days_later).prices == wanted


@given(
    book=books(),
    started_at_ns=minutes,
    outcome=outcomes,
    prompt=st.one_of(st.integers(0, 30), st.integers(0, 200_000)),
    cached_share=shares,
    max_tokens=st.integers(1, 100_000),
    output_share=shares,
    choices=st.integers(1, 8),
)
@settings(max_examples=300)
def test_a_hold_covers_whatever_happens(
    book: Book,
    started_at_ns: int,
    outcome: Outcome,
    prompt: int,
    cached_share: int,
    max_tokens: int,
    output_share: int,
    choices: int,
) -> None:
    """Under any book, at any time of day, for any outcome and however much was cached."""
    cached = prompt * cached_share // 100
    used = usage(
        outcome=outcome,
        input_tokens=prompt - cached,
        cached_tokens=cached,
        output_tokens=max_tokens * choices * output_share // 100,
        device_ms=7,
        num_prompt_tokens=prompt,
        started_at_ns=started_at_ns,
    )
    rates = book.rates("tiny", "standard", prompt, started_at_ns)
    settlement = rate(used, book.rates_of(used.admitted))
    assert settlement.amount_nano <= decoder_worst_case(rates, prompt, max_tokens, choices)
    assert all(line.amount_nano == 0 for line in settlement.lines if line.disposition != "billed")


@given(
    book=books(),
    started_at_ns=minutes,
    outcome=outcomes,
    num_tokens=st.integers(0, 100_000),
    share=shares,
    device_ms=st.integers(1, 10**6),
)
def test_the_holds_of_other_kinds_cover_it_too(
    book: Book,
    started_at_ns: int,
    outcome: Outcome,
    num_tokens: int,
    share: int,
    device_ms: int,
) -> None:
    used = num_tokens * share // 100
    facts: dict[str, Any] = {"outcome": outcome, "started_at_ns": started_at_ns}
    rates = book.rates("tiny", "standard", num_tokens, started_at_ns)
    embedded = usage(
        kind="embedder", input_tokens=used, num_prompt_tokens=num_tokens, device_ms=3, **facts
    )
    assert rate(embedded, rates).amount_nano <= embedder_worst_case(rates, num_tokens)
    predicted = usage(kind="tensor", device_ms=device_ms * share // 100, **facts)
    rates = book.rates_of(predicted.admitted)
    assert rate(predicted, rates).amount_nano <= tensor_worst_case(rates, device_ms)


@given(
    book=books(),
    counts=st.dictionaries(st.sampled_from(DIMENSIONS), st.integers(0, 10**9)),
    outcome=outcomes,
)
def test_the_general_bound_covers_every_dimension(
    book: Book, counts: dict[str, int], outcome: Outcome
) -> None:
    """Also the dimensions that no request counts yet: the prompt is parted in three, and what is
    kept in a cache is bounded by its lease."""
    prompt = sum(counts.get(name, 0) for name in PROMPT_DIMENSIONS)
    limits = {name: count for name, count in counts.items() if name not in PROMPT_DIMENSIONS}
    rates = book.rates("tiny", "batch", prompt, 0)
    lines = lines_of(counts, outcome, BILLED["decoder"], rates)
    amount_nano = sum(line.amount_nano for line in lines)
    assert amount_nano <= worst_case(rates, "decoder", prompt, limits)


def test_three_lines_of_a_prompt_that_all_round_up_are_held() -> None:
    """1.5 each: three lines of 2. Rounded in one it would be 4.5, thus 4."""
    half = Price(1, 2)
    rates = Rates("pb", "usd", dict.fromkeys(PROMPT_DIMENSIONS, half))
    counts = dict.fromkeys(PROMPT_DIMENSIONS, 3)
    lines = lines_of(counts, "completed", BILLED["decoder"], rates)
    assert [line.amount_nano for line in lines] == [2, 2, 2]
    assert worst_case(rates, "decoder", 9, {}) == 6


def test_holds_by_hand() -> None:
    # 1,000 x 100, rounded in two lines at most: 1 more; 3 x 50 x 400; a request 100.
    assert decoder_worst_case(RATES, 1_000, 50, 3) == 100_000 + 1 + 60_000 + 100
    assert embedder_worst_case(RATES, 1_000) == 100_000 + 1 + 100
    plain = Rates("pb", "usd", {"input": Price(7, 2), "device_ms": Price(9, 1)})
    assert worst_case(plain, "decoder", 3, {"device_ms": 5}) == 10  # 10.5, half to even
    assert worst_case(plain, "tensor", 3, {"device_ms": 5}) == 45
    assert worst_case(plain, "decoder", 0, {"output": 5}) == 0, "what has no price is free"


def test_the_hold_of_a_prediction_follows_the_build_s_measurement() -> None:
    assert held_device_ms(2.5) == 11
    assert held_device_ms(0.5) == 3
    assert held_device_ms(0.0) == held_device_ms(float("nan")) == 1000
    assert tensor_worst_case(RATES, 9) == 2_600


def test_a_row_takes_what_the_least_size_that_covers_it_took() -> None:
    measured = {8: 1.0, 64: 3.0}
    assert [slowest_row_ms(measured, size) for size in (7, 8, 9, 64, 128)] == [1, 1, 3, 3, 12]
