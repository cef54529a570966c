"""The pages that customers see at Stripe, as small as they can be: Checkout, the portal, and an
invoice. Each is a form that does with a press what `People` does with a call."""

from html import escape
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from tests.stripe_stand_in import invoices, payments
from tests.stripe_stand_in.errors import Object, missing
from tests.stripe_stand_in.idempotency import Answer

if TYPE_CHECKING:
    from tests.stripe_stand_in.server import StandIn

_HTML = {"Content-Type": "text/html; charset=utf-8"}


def page(stand_in: "StandIn", method: str, path: str, body: str) -> Answer:
    kind, _, id = path.strip("/").partition("/")
    fields = {name: values[0] for name, values in parse_qs(body).items()}
    show = {"pay": _checkout, "portal": _portal, "invoice": _invoice}.get(kind)
    if show is None:
        raise missing("page", path)
    return show(stand_in, id, fields if method == "POST" else {})


def _checkout(stand_in: "StandIn", id: str, fields: dict[str, str]) -> Answer:
    session = stand_in.account.get("checkout.session", id)
    if session["status"] == "open" and "card" in fields:
        session = stand_in.pay_checkout(id, fields["card"])
        intent = stand_in.account.get("payment_intent", session["payment_intent"])
        if intent["status"] == "requires_action":
            stand_in.authenticate(intent["id"])
    if session["status"] == "complete":
        return _redirect(session["success_url"].replace("{CHECKOUT_SESSION_ID}", id))
    if session["status"] == "expired":
        return _html("Expired", "<p>This page has expired.</p>")
    intent_id = session["payment_intent"]
    intent = stand_in.account.look(intent_id) if intent_id else None
    error = (intent or {}).get("last_payment_error")
    return _html(
        "Pay",
        f"<p>{_money(session['amount_total'], session['currency'])}</p>"
        + (f'<p role="alert">{escape(error["message"])}</p>' if error else "")
        + _card_form("Pay")
        + f'<p><a href="{escape(session["cancel_url"] or "")}">Back</a></p>',
    )


def _portal(stand_in: "StandIn", id: str, fields: dict[str, str]) -> Answer:
    session = stand_in.account.get("billing_portal.session", id)
    customer_id = session["customer"]
    if "card" in fields:
        stand_in.save_card(customer_id, fields["card"])
    if "remove" in fields:
        stand_in.remove_card(fields["remove"])
    methods = [m for m in stand_in.account.all("payment_method") if m["customer"] == customer_id]
    billed = [i for i in stand_in.account.all("invoice") if i["customer"] == customer_id]
    return _html(
        "Billing",
        "<h2>Cards</h2>"
        + "".join(_method_row(method) for method in methods)
        + _card_form("Add card")
        + "<h2>Invoices</h2>"
        + "".join(_invoice_row(invoice) for invoice in billed if invoice["number"])
        + f'<p><a href="{escape(session["return_url"])}">Return</a></p>',
    )


def _invoice(stand_in: "StandIn", id: str, fields: dict[str, str]) -> Answer:
    if "card" in fields:
        stand_in.pay_invoice(id, fields["card"])
    invoice = stand_in.account.get("invoice", id)
    rows = "".join(
        f"<tr><td>{escape(line['description'])}</td>"
        f"<td>{_money(line['amount'], line['currency'])}</td></tr>"
        for line in invoices.all_lines(stand_in.account, id)
    )
    return _html(
        f"Invoice {invoice['number']}",
        f"<p>{escape(invoice['status'])}</p><table>{rows}</table>"
        f"<p>{_money(invoice['amount_due'], invoice['currency'])}</p>"
        + (_card_form("Pay") if invoice["status"] == "open" else ""),
    )


def _method_row(method: Object) -> str:
    card = method.get("card") or {"display_brand": method["type"], "last4": ""}
    return (
        f"<form method=post><p>{escape(card['display_brand'])} {card['last4']}"
        f' <button name="remove" value="{method["id"]}">Remove</button></p></form>'
    )


def _invoice_row(invoice: Object) -> str:
    total = _money(invoice["total"], invoice["currency"])
    return (
        f'<p><a href="/invoice/{invoice["id"]}">{escape(invoice["number"])}</a> {total}'
        f" {escape(invoice['status'])}</p>"
    )


def _card_form(button: str) -> str:
    return (
        f'<form method="post"><label>Card number <input name="card" value="{payments.GOOD_CARD}">'
        f"</label> <button>{button}</button></form>"
    )


def _money(cents: int, currency: str) -> str:
    return f"{cents // 100}.{cents % 100:02d} {currency.upper()}"


def _html(title: str, content: str) -> Answer:
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<h1>{escape(title)}</h1>{content}</html>"
    )
    return Answer(200, text.encode(), _HTML)


def _redirect(url: str) -> Answer:
    return Answer(303, b"", {"Location": url})
