"""Rounding and display at their edges, against exact fractions."""

from fractions import Fraction

import pytest

from app.core.money import format_exact, format_nano, price_of, write_amount


def test_rounding_is_half_to_even_for_every_small_case() -> None:
    for unit_scale in range(1, 13):
        for product in range(120):
            assert price_of(1, product, unit_scale) == round(Fraction(product, unit_scale))
            assert price_of(product, 1, unit_scale) == round(Fraction(product, unit_scale))


@pytest.mark.parametrize(("quantity", "unit_scale"), [(-1, 1), (1, 0), (1, -1)])
def test_what_means_nothing_is_refused(quantity: int, unit_scale: int) -> None:
    with pytest.raises(AssertionError):
        price_of(quantity, 1, unit_scale)


def test_amounts_are_cut_where_they_are_told_to_be() -> None:
    assert format_nano(1_234_567_891) == "$1.234567"
    assert format_nano(1_999_999_999, places=0) == "$1"
    assert format_nano(-1_500_000_000, "eur", places=2) == "-€1.50"
    assert format_nano(1_500_000_000, "sek", places=2) == "1.50 SEK"
    assert format_nano(0) == "$0.000000"
    assert format_nano(-1, places=9) == "-$0.000000001"


def test_amounts_are_written_with_two_decimals_and_no_more_than_needed() -> None:
    assert write_amount(0) == "0.00"
    assert write_amount(1_500_000_000) == "1.50"
    assert write_amount(1_234_500_000) == "1.2345"
    assert write_amount(7) == "0.000000007"


def test_exact_amounts_keep_their_sign_and_their_symbol() -> None:
    assert format_exact(0) == "$0.00"
    assert format_exact(1) == "$0.000000001"
    assert format_exact(-1_234_500_000_000) == "-$1,234.50"
    assert format_exact(100_000_000, "sek") == "0.10 SEK"
