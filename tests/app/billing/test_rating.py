"""Golden bills, rounding, and that a hold always covers what is charged."""

from hypothesis import given
from hypothesis import strategies as st

from app.billing.prices import FIRST_PRICES, Price, Rates
from app.billing.rating import (
    Line,
    decoder_worst_case,
    held_device_ms,
    rate,
    tensor_worst_case,
)
from app.metering.records import AdmitRecord, Outcome, Usage
from runtime.protocol import Kind

RATES = Rates("pb_1", "usd", FIRST_PRICES)


def usage(
    *,
    kind: Kind = "decoder",
    outcome: Outcome = "completed",
    input_tokens: int = 0,
    cached_tokens: int = 0,
    output_tokens: int = 0,
    device_ms: int = 0,
) -> Usage:
    admitted = AdmitRecord(
        "req_1", "org_1", "key_1", "test", "tiny", 1, "/v1/completions", kind, "standard", "pb_1", 0
    )
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


@given(
    input_price=prices,
    cached_price=prices,
    output_price=prices,
    request_price=prices,
    prompt=st.integers(0, 200_000),
    cached_share=st.integers(0, 100),
    max_tokens=st.integers(1, 100_000),
    output_share=st.integers(0, 100),
    choices=st.integers(1, 8),
)
def test_a_hold_covers_whatever_happens(
    input_price: Price,
    cached_price: Price,
    output_price: Price,
    request_price: Price,
    prompt: int,
    cached_share: int,
    max_tokens: int,
    output_share: int,
    choices: int,
) -> None:
    rates = Rates(
        "pb",
        "usd",
        {
            "input": input_price,
            "cached_input": cached_price,
            "output": output_price,
            "request": request_price,
        },
    )
    cached = prompt * cached_share // 100
    settlement = rate(
        usage(
            input_tokens=prompt - cached,
            cached_tokens=cached,
            output_tokens=max_tokens * choices * output_share // 100,
        ),
        rates,
    )
    assert settlement.amount_nano <= decoder_worst_case(rates, prompt, max_tokens, choices)


def test_the_hold_of_a_prediction_follows_the_build_s_measurement() -> None:
    assert held_device_ms(2.5) == 11
    assert held_device_ms(0.0) == held_device_ms(float("nan")) == 1000
    assert tensor_worst_case(RATES, 9) == 2_600
