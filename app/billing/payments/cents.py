"""Cents, the smallest unit that Stripe deals in, and nano-units."""

from app.core.errors import Conflict, InvalidRequest
from app.core.money import format_nano, parse_amount

NANO_PER_CENT = 10_000_000
# In these a unit is not a hundred of the smallest.
_WITHOUT_HUNDREDTHS = (
    *("bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "mga", "pyg", "rwf", "ugx", "vnd", "vuv"),
    *("xaf", "xof", "xpf", "bhd", "jod", "kwd", "omr", "tnd"),
)


def parse_cents(text: str, param: str, lowest_cents: int, highest_cents: int, currency: str) -> int:
    """Whole cents from `25.00`. Raises `InvalidRequest` saying what is accepted."""
    try:
        nano = parse_amount(text)
    except ValueError as error:
        raise InvalidRequest(f"{param} is not {error}.", param=param) from None
    cents, rest = divmod(nano, NANO_PER_CENT)
    if rest:
        raise InvalidRequest(f"{param} has at most two decimals.", param=param)
    if not lowest_cents <= cents <= highest_cents:
        raise InvalidRequest(
            f"{param} is between {write_cents(lowest_cents, currency)} and "
            f"{write_cents(highest_cents, currency)}.",
            param=param,
        )
    return cents


def write_cents(cents: int, currency: str) -> str:
    """`$25.00`."""
    return format_nano(cents * NANO_PER_CENT, currency, 2)


def require_cents(currency: str) -> None:
    """Raises `Conflict` for a currency that is not counted in hundredths."""
    if currency.lower() in _WITHOUT_HUNDREDTHS:
        raise Conflict(
            f"Payments in {currency.upper()} are not supported: its smallest unit is not a "
            "hundredth. The operator can keep its books in it, without Stripe.",
            code="currency_not_supported",
        )
