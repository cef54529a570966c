"""An invoice's lines in whole cents, as Stripe shows them.

Owns the division: exact amounts of nano-units become cents that add up to the invoice's, each at
most one cent from its exact amount. Says nothing of how they get to Stripe.
"""

from collections.abc import Sequence

from app.billing.payments.cents import NANO_PER_CENT
from app.billing.payments.tables import Invoice, InvoiceLine
from app.billing.stripe_invoices import MAX_INVOICE_LINES
from app.billing.stripe_objects import LineParams
from app.core.money import format_nano

# Two more may follow them: credit, and what is carried over.
MAX_USAGE_LINES = MAX_INVOICE_LINES - 2
NANO_PLACES = 9
CREDIT = "credit"
CARRIED = "carried"


def stripe_lines(invoice: Invoice, lines: Sequence[InvoiceLine]) -> list[LineParams]:
    """Usage, less credit, with what is carried over: `due_cents` altogether."""
    exact = _usage(invoice, lines)
    if invoice.credit_nano:
        exact.append((CREDIT, "Paid from credit", -invoice.credit_nano))
    if invoice.carry_in_nano:
        amount = format_nano(invoice.carry_in_nano, invoice.currency, NANO_PLACES)
        words = f"Carried over from earlier months, refunds and payments included: {amount}"
        exact.append((CARRIED, words, invoice.carry_in_nano))
    cents = whole_cents([nano for _, _, nano in exact], invoice.due_cents)
    return [
        LineParams(
            description=words,
            amount_cents=amount_cents,
            metadata={"invoice_id": invoice.id, "position": position},
        )
        for (position, words, _), amount_cents in zip(exact, cents, strict=True)
    ]


def whole_cents(amounts_nano: Sequence[int], total_cents: int) -> list[int]:
    """Each amount cut to cents; those that were cut most get one more until the total is right.
    The exact sum must lie within a cent above the total."""
    cents = [nano // NANO_PER_CENT for nano in amounts_nano]
    missing = total_cents - sum(cents)
    assert 0 <= missing <= len(cents), "the total is the sum, cut"
    most_cut = sorted(range(len(cents)), key=lambda i: (-(amounts_nano[i] % NANO_PER_CENT), i))
    for i in most_cut[:missing]:
        cents[i] += 1
    return cents


def _usage(invoice: Invoice, lines: Sequence[InvoiceLine]) -> list[tuple[str, str, int]]:
    """Position, words and exact amount. Stripe takes only so many lines: the smallest are added
    up into one, and are listed one by one in our own invoice."""
    shown, rest = list(lines), list[InvoiceLine]()
    if len(lines) > MAX_USAGE_LINES:
        dearest = sorted(lines, key=lambda line: (-line.amount_nano, line.position))
        kept = {line.position for line in dearest[: MAX_USAGE_LINES - 1]}
        shown = [line for line in lines if line.position in kept]
        rest = [line for line in lines if line.position not in kept]
    found = [
        (str(line.position), _words(line, invoice.currency), line.amount_nano) for line in shown
    ]
    if rest:
        words = f"{len(rest)} smaller items, listed in the invoice at this service"
        found.append(("rest", words, sum(line.amount_nano for line in rest)))
    return found


def _words(line: InvoiceLine, currency: str) -> str:
    """The exact quantity, price and amount: the cents beside them are cut."""
    price = format_nano(line.price_nano, currency, NANO_PLACES)
    amount = format_nano(line.amount_nano, currency, NANO_PLACES)
    return (
        f"{line.endpoint_name}, {line.dimension.replace('_', ' ')}, {line.service_class}: "
        f"{line.quantity:,} at {price} per {line.unit_scale:,} = {amount}"
    )
