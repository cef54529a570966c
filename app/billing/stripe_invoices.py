"""Invoices at Stripe: drafts with our lines, finalising, and how they end.

Part of the client of `stripe.py`. Stripe only carries the invoice: what is on it is ours.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING

from app.billing.stripe_errors import StripeRejected
from app.billing.stripe_lists import PAGE, created_from, once
from app.billing.stripe_objects import (
    Invoice,
    InvoiceLine,
    LineParams,
    read_invoice,
    read_invoice_line,
)

if TYPE_CHECKING:
    import stripe

MAX_INVOICE_LINES = 250  # Stripe's limit for one invoice
DAYS_UNTIL_DUE = 30
_LINES_PER_CALL = 100
_PARTS = ["payments"]


def whole_cents(amount: int) -> int:
    """Money goes to Stripe only as whole numbers of the smallest unit: the SDK would send a small
    Decimal as 7.5E-7."""
    assert type(amount) is int, f"not whole cents: {amount!r}"
    return amount


class StripeInvoices:
    """The part of `Stripe` that deals in invoices."""

    _client: "stripe.StripeClient"

    def create_invoice(
        self,
        key: str,
        *,
        customer_id: str,
        currency: str,
        invoice_id: str,
        description: str,
        is_automatic: bool,
        payment_method_id: str = "",
    ) -> Invoice:
        """An empty draft, which Stripe leaves alone until it is finalised. Automatic: charged to
        the customer's card, or `payment_method_id`; otherwise sent by e-mail, to be paid there."""
        params: stripe.params.InvoiceCreateParams = {
            "customer": customer_id,
            "currency": currency.lower(),
            "description": description,
            "auto_advance": False,
            "pending_invoice_items_behavior": "exclude",
            "collection_method": "charge_automatically" if is_automatic else "send_invoice",
            "metadata": {"invoice_id": invoice_id, "operation_key": key},
            "expand": _PARTS,
        }
        if not is_automatic:
            params["days_until_due"] = DAYS_UNTIL_DUE
        elif payment_method_id:
            params["default_payment_method"] = payment_method_id
        with self._call():
            invoice = self._client.v1.invoices.create(params, once(key))
        return read_invoice(invoice.to_dict(for_json=True))

    def add_invoice_lines(
        self, key: str, *, stripe_invoice_id: str, lines: Sequence[LineParams]
    ) -> Invoice:
        """Adds lines to a draft, in several calls when there are many: after a failure some may be
        there. The same key completes them within 24 hours; later, list the lines and add what is
        missing. Stripe takes MAX_INVOICE_LINES in all."""
        assert lines, "no lines to add"
        invoice: stripe.Invoice | None = None
        for start in range(0, len(lines), _LINES_PER_CALL):
            added: list[stripe.params.InvoiceAddLinesParamsLine] = [
                {
                    "description": line.description,
                    "amount": whole_cents(line.amount_cents),
                    "metadata": line.metadata,
                }
                for line in lines[start : start + _LINES_PER_CALL]
            ]
            with self._call():
                invoice = self._client.v1.invoices.add_lines(
                    stripe_invoice_id,
                    {"lines": added, "expand": _PARTS},
                    once(f"{key}:{start}"),
                )
        assert invoice is not None
        return read_invoice(invoice.to_dict(for_json=True))

    def finalise_invoice(self, key: str, stripe_invoice_id: str) -> Invoice:
        """From here on the invoice cannot change, and Stripe collects it."""
        params: stripe.params.InvoiceFinalizeInvoiceParams = {
            "auto_advance": True,
            "expand": _PARTS,
        }
        with self._call():
            invoice = self._client.v1.invoices.finalize_invoice(
                stripe_invoice_id, params, once(key)
            )
        return read_invoice(invoice.to_dict(for_json=True))

    def void_invoice(self, key: str, stripe_invoice_id: str) -> Invoice:
        """Ends an open invoice as if it had never been."""
        with self._call():
            invoice = self._client.v1.invoices.void_invoice(
                stripe_invoice_id, {"expand": _PARTS}, once(key)
            )
        return read_invoice(invoice.to_dict(for_json=True))

    def mark_uncollectible(self, key: str, stripe_invoice_id: str) -> Invoice:
        """Gives up on an open invoice. It can still be paid."""
        with self._call():
            invoice = self._client.v1.invoices.mark_uncollectible(
                stripe_invoice_id, {"expand": _PARTS}, once(key)
            )
        return read_invoice(invoice.to_dict(for_json=True))

    def delete_draft(self, stripe_invoice_id: str) -> None:
        """Deletes a draft; that it is gone already is no error."""
        try:
            with self._call():
                self._client.v1.invoices.delete(stripe_invoice_id)
        except StripeRejected as error:
            if error.code != "resource_missing":
                raise

    def get_invoice(self, stripe_invoice_id: str) -> Invoice:
        with self._call():
            invoice = self._client.v1.invoices.retrieve(stripe_invoice_id, {"expand": _PARTS})
        return read_invoice(invoice.to_dict(for_json=True))

    def find_invoice(
        self, invoice_id: str, since: datetime, customer_id: str = ""
    ) -> Invoice | None:
        params: stripe.params.InvoiceListParams = {
            "limit": PAGE,
            "created": {"gte": created_from(since)},
            "expand": ["data.payments"],
        }
        if customer_id:
            params["customer"] = customer_id
        with self._call():
            for found in self._client.v1.invoices.list(params).auto_paging_iter():
                invoice = read_invoice(found.to_dict(for_json=True))
                if invoice.invoice_id == invoice_id:
                    return invoice
        return None

    def find_paid_invoice(self, payment_id: str) -> str:
        """The id at Stripe of the invoice that a payment is for; "" for any other payment."""
        params: stripe.params.InvoicePaymentListParams = {
            "payment": {"type": "payment_intent", "payment_intent": payment_id},
            "limit": 1,
        }
        with self._call():
            found = self._client.v1.invoice_payments.list(params).to_dict(for_json=True)
        return next((str(each["invoice"]) for each in found["data"]), "")

    def list_invoice_lines(self, stripe_invoice_id: str) -> list[InvoiceLine]:
        """All lines of an invoice, whoever added them."""
        with self._call():
            found = self._client.v1.invoices.line_items.list(stripe_invoice_id, {"limit": PAGE})
            lines = [line.to_dict(for_json=True) for line in found.auto_paging_iter()]
        return [read_invoice_line(line) for line in lines]

    def _call(self) -> AbstractContextManager[None]:
        raise NotImplementedError
