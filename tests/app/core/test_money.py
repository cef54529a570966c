"""Money is exact: integers, one rounding, nothing lost in display."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.money import format_nano, parse_amount, price_of

amounts = st.integers(min_value=0, max_value=10**15)


@pytest.mark.parametrize(
    ("quantity", "price_nano", "unit_scale", "expected"),
    [
        (0, 150_000_000, 1_000_000, 0),
        (1_050, 150_000_000, 1_000_000, 157_500),
        (1, 1, 2, 0),  # half goes to even
        (3, 1, 2, 2),
        (30 * 24 * 3600 * 1_000_000, 4_500_000_000, 3600 * 1_000_000, 3_240_000_000_000),
    ],
)
def test_a_price_is_rounded_once_half_to_even(
    quantity: int, price_nano: int, unit_scale: int, expected: int
) -> None:
    assert price_of(quantity, price_nano, unit_scale) == expected


@given(amounts, amounts, st.integers(min_value=1, max_value=10**12))
def test_rounding_agrees_with_exact_fractions(quantity: int, price: int, scale: int) -> None:
    assert price_of(quantity, price, scale) == round(Fraction(quantity * price, scale))


@given(st.integers(min_value=0, max_value=10**18))
def test_what_is_shown_reads_back(nano: int) -> None:
    assert parse_amount(format_nano(nano, places=9)) == nano


@pytest.mark.parametrize(
    ("nano", "currency", "places", "shown"),
    [
        (1_234_567_890, "usd", 6, "$1.234567"),
        (-5, "usd", 9, "-$0.000000005"),
        (12_000_000_000_000, "eur", 2, "€12,000.00"),
        (1_000_000_000, "chf", 2, "1.00 CHF"),
    ],
)
def test_amounts_are_shown_with_their_currency(
    nano: int, currency: str, places: int, shown: str
) -> None:
    assert format_nano(nano, currency, places) == shown


@pytest.mark.parametrize(
    "text", ["", ".", "-1", "1.0000000001", "a", "1e3", "1,50", "1,0000", "²", "\u0661", "9" * 5000]
)
def test_what_is_not_an_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="an amount such as"):
        parse_amount(text)
