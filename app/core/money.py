"""Money: integers of nano-units (10^-9 of the currency). No floats anywhere.

Owns rounding and display. Prices are nano-units per `unit_scale` of something counted.
"""

import re

NANO_PER_UNIT = 1_000_000_000
SYMBOLS = {"usd": "$", "eur": "€", "gbp": "£"}
# Commas only where they part thousands: `1,50` is no hundred and fifty.
_AMOUNT = re.compile(
    r"(?=[.]?[0-9])(?P<units>[0-9]{1,3}(,[0-9]{3}){1,5}|[0-9]{0,18})([.](?P<decimals>[0-9]{0,9}))?"
)


def price_of(quantity: int, price_nano: int, unit_scale: int) -> int:
    """Nano-units for `quantity` at `price_nano` per `unit_scale`, rounded half to even once."""
    assert quantity >= 0
    assert unit_scale > 0
    whole, rest = divmod(quantity * price_nano, unit_scale)
    twice = 2 * rest
    if twice > unit_scale or (twice == unit_scale and whole % 2):
        whole += 1
    return whole


def format_nano(nano: int, currency: str = "usd", places: int = 6) -> str:
    """`$0.001234`: cut (not rounded) to `places`, so that a sum never shows more than is owed."""
    sign = "-" if nano < 0 else ""
    units, rest = divmod(abs(nano), NANO_PER_UNIT)
    decimals = f"{rest:09d}"[:places]
    amount = f"{units:,}.{decimals}" if places else f"{units:,}"
    symbol = SYMBOLS.get(currency)
    return f"{sign}{symbol}{amount}" if symbol else f"{sign}{amount} {currency.upper()}"


def format_exact(nano: int, currency: str = "usd") -> str:
    """`$0.10`, `$0.0000025`: all there is of an amount, with at least two decimals."""
    sign, amount = "-" if nano < 0 else "", write_amount(abs(nano))
    units, _, decimals = amount.partition(".")
    amount = f"{int(units):,}.{decimals}"
    symbol = SYMBOLS.get(currency)
    return f"{sign}{symbol}{amount}" if symbol else f"{sign}{amount} {currency.upper()}"


def parse_amount(text: str) -> int:
    """Nano-units from `12.50`. Raises `ValueError` saying what is accepted."""
    amount = _AMOUNT.fullmatch(text.strip().lstrip("$€£"))
    if amount is None:
        raise ValueError("an amount such as 12.50, with at most nine decimals")
    units, decimals = amount["units"].replace(",", ""), amount["decimals"] or ""
    return int(units or "0") * NANO_PER_UNIT + int(decimals.ljust(9, "0"))


def write_amount(nano: int) -> str:
    """`12.50`, as `parse_amount` reads it: at least two decimals, no more than needed."""
    units, rest = divmod(nano, NANO_PER_UNIT)
    return f"{units}.{f'{rest:09d}'.rstrip('0').ljust(2, '0')}"
