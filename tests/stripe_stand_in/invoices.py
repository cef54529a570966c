"""Invoices: drafts, lines, finalising, collecting and how they end."""

from collections.abc import Sequence

from tests.stripe_stand_in import objects, payments
from tests.stripe_stand_in.account import Account, page
from tests.stripe_stand_in.errors import ApiError, Object, refused

MAX_LINES = 250
COLLECT_AFTER_SECONDS = 3600
FINALISE_AFTER_SECONDS = 3600  # a draft that advances by itself


def create(account: Account, customer: Object, params: Object) -> Object:
    is_sent = params.get("collection_method") == "send_invoice"
    if is_sent and not customer["email"]:
        raise refused(
            "Missing email. In order to create invoices that are sent to the customer, the"
            " customer must have a valid email.",
            "customer_missing_email",
        )
    if is_sent and not {"days_until_due", "due_date"} & set(params):
        raise refused("Invoices with send_invoice need `days_until_due` or `due_date`.")
    now = account.clock.now()
    invoice = objects.invoice(account.new_id("in"), now, customer, params.get("currency", "usd"))
    for name in ("auto_advance", "collection_method", "description", "metadata"):
        invoice[name] = params.get(name, invoice[name])
    invoice["default_payment_method"] = params.get("default_payment_method")
    if is_sent:
        invoice["due_date"] = params.get("due_date", now + params.get("days_until_due", 0) * 86400)
    if invoice["auto_advance"]:
        invoice["automatically_finalizes_at"] = now + FINALISE_AFTER_SECONDS
    account.add(invoice)
    account.emit("invoice.created", invoice)
    return invoice


def add_lines(account: Account, invoice: Object, lines: Sequence[Object]) -> Object:
    check_draft(invoice)
    if len(all_lines(account, invoice["id"])) + len(lines) > MAX_LINES:
        raise refused(f"An invoice can have at most {MAX_LINES} items.", "invoice_too_many_items")
    for params in lines:
        line = objects.invoice_line(
            account.new_id("il"),
            invoice,
            params.get("amount", 0),
            params.get("description", ""),
            account.new_id("ii"),
        )
        line["metadata"] = params.get("metadata", {})
        account.add(line)
    _sum(account, invoice)
    account.emit("invoice.updated", invoice)
    return invoice


def check_draft(invoice: Object) -> None:
    if invoice["status"] != "draft":
        raise refused(
            "This invoice is already finalized, you can't change it.", "invoice_not_editable"
        )


def all_lines(account: Account, invoice_id: str) -> list[Object]:
    return [line for line in account.all("line_item") if line["invoice"] == invoice_id]


def _sum(account: Account, invoice: Object) -> None:
    """Adds up. The invoice itself shows only the first page of its lines."""
    lines = all_lines(account, invoice["id"])
    invoice["lines"] = page(lines, {}, invoice["lines"]["url"])
    total = sum(line["amount"] for line in lines)
    for name in ("subtotal", "subtotal_excluding_tax", "total", "total_excluding_tax"):
        invoice[name] = total
    invoice["amount_due"] = max(0, total + invoice["starting_balance"])
    invoice["amount_remaining"] = invoice["amount_due"]


def finalise(account: Account, invoice: Object, is_advancing: bool) -> Object:
    """Opens the invoice. What Stripe cannot charge for being too little, or negative, goes into
    the customer's balance there, to be on the next invoice: `amount_due` is not always `total`."""
    check_draft(invoice)
    if invoice["id"] in account.stuck_ids:
        raise _stuck(account, invoice)
    now = account.clock.now()
    customer = account.get("customer", invoice["customer"])
    invoice["starting_balance"] = customer["balance"]
    _sum(account, invoice)
    owed = invoice["total"] + invoice["starting_balance"]
    if owed < payments.MINIMUM_CENTS:
        invoice |= {"amount_due": 0, "amount_remaining": 0}
    customer["balance"] = owed - invoice["amount_due"]
    number = f"{customer['invoice_prefix']}-{customer['next_invoice_sequence']:04d}"
    customer["next_invoice_sequence"] += 1
    invoice["status_transitions"]["finalized_at"] = now
    invoice |= {
        "status": "open",
        "number": number,
        "auto_advance": is_advancing,
        "effective_at": now,
        "ending_balance": customer["balance"],
        "hosted_invoice_url": f"{account.base_url}/invoice/{invoice['id']}",
        "invoice_pdf": f"{account.base_url}/invoice/{invoice['id']}/pdf",
    }
    account.emit("invoice.finalized", invoice)
    if invoice["amount_due"] == 0:
        _pay(account, invoice, None)
    elif is_advancing and invoice["collection_method"] == "charge_automatically":
        invoice["next_payment_attempt"] = now + COLLECT_AFTER_SECONDS
    elif is_advancing:
        account.emit("invoice.sent", invoice)
    return invoice


def _stuck(account: Account, invoice: Object) -> ApiError:
    code = "customer_tax_location_invalid"
    message = "The customer's location isn't recognized. Set a valid customer address."
    invoice["last_finalization_error"] = {
        "code": code,
        "message": message,
        "type": "invalid_request_error",
    }
    account.emit("invoice.finalization_failed", invoice)
    return refused(message, code)


def collect(account: Account, invoice: Object, method: Object | None = None) -> Object:
    """One attempt to be paid: with this method, or the one that is set for it."""
    if invoice["status"] not in ("open", "uncollectible"):
        raise refused(f"Invoice is {invoice['status']}, not open", "invoice_not_open")
    invoice |= {"attempt_count": invoice["attempt_count"] + 1, "attempted": True}
    invoice["next_payment_attempt"] = None
    method = method or _method(account, invoice)
    if method is None:
        account.emit("invoice.payment_failed", invoice)
        return invoice
    customer_id, amount = invoice["customer"], invoice["amount_due"]
    intent = payments.new_intent(account, amount, invoice["currency"], customer_id)
    intent["description"] = f"Payment for Invoice {invoice['number']}"
    payment = objects.invoice_payment(account.new_id("inpay"), account.clock.now(), invoice, intent)
    account.add(payment)
    payments.confirm(account, intent, method, is_off_session=True)
    if intent["status"] == "succeeded":
        payment |= {"status": "paid", "amount_paid": amount}
        _pay(account, invoice, intent)
    else:
        account.emit("invoice.payment_failed", invoice)
    return invoice


def _method(account: Account, invoice: Object) -> Object | None:
    customer = account.get("customer", invoice["customer"])
    set_for = customer["invoice_settings"]["default_payment_method"]
    id = invoice["default_payment_method"] or set_for
    return account.get("payment_method", id) if id else None


def _pay(account: Account, invoice: Object, intent: Object | None) -> None:
    invoice["status_transitions"]["paid_at"] = account.clock.now()
    invoice |= {
        "status": "paid",
        "amount_paid": invoice["amount_due"] if intent else 0,
        "amount_remaining": 0,
        "next_payment_attempt": None,
    }
    account.emit("invoice.paid", invoice)
    account.emit("invoice.payment_succeeded", invoice)


def end(account: Account, invoice: Object, status: str, allowed: Sequence[str]) -> Object:
    """Makes it void or uncollectible."""
    if invoice["status"] not in allowed:
        raise refused(f"Invoice is {invoice['status']}, it must be one of {list(allowed)}.")
    name = {"void": "voided", "uncollectible": "marked_uncollectible"}[status]
    invoice["status_transitions"][f"{name}_at"] = account.clock.now()
    invoice |= {"status": status, "next_payment_attempt": None}
    account.emit(f"invoice.{name}", invoice)
    return invoice
