"""The endpoints: path, the SDK's type of the parameters, and what is done."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import stripe
from stripe.params import billing_portal, checkout

from tests.stripe_stand_in import invoices, objects, payments
from tests.stripe_stand_in.account import Account, page
from tests.stripe_stand_in.errors import Object, invalid, refused

Handler = Callable[..., Object]  # (account, params, *ids from the path)
p = stripe.params


@dataclass(frozen=True)
class Route:
    method: str
    pattern: re.Pattern[str]
    params: type
    handler: Handler


ROUTES: list[Route] = []


def route(method: str, path: str, params: type) -> Callable[[Handler], Handler]:
    pattern = re.compile(re.sub(r"\{\w+\}", r"([^/]+)", path))

    def register(handler: Handler) -> Handler:
        ROUTES.append(Route(method, pattern, params, handler))
        return handler

    return register


def find(method: str, path: str) -> tuple[Route, tuple[str, ...]] | None:
    for each in ROUTES:
        match = each.pattern.fullmatch(path)
        if each.method == method and match:
            return each, match.groups()
    return None


def _get(path: str, kind: str, params: type) -> None:
    @route("GET", path + "/{id}", params)
    def get(account: Account, params: Object, id: str) -> Object:
        return account.get(kind, id)


def _list(path: str, kind: str, params: type, **filters: str) -> None:
    @route("GET", path, params)
    def listed(account: Account, params: Object) -> Object:
        return account.listed(kind, params, path, filters)


_get("/v1/payment_methods", "payment_method", p.PaymentMethodRetrieveParams)
_get("/v1/checkout/sessions", "checkout.session", checkout.SessionRetrieveParams)
_get("/v1/payment_intents", "payment_intent", p.PaymentIntentRetrieveParams)
_get("/v1/charges", "charge", p.ChargeRetrieveParams)
_get("/v1/refunds", "refund", p.RefundRetrieveParams)
_get("/v1/disputes", "dispute", p.DisputeRetrieveParams)
_get("/v1/invoices", "invoice", p.InvoiceRetrieveParams)
_get("/v1/events", "event", p.EventRetrieveParams)
_get("/v1/balance_transactions", "balance_transaction", p.BalanceTransactionRetrieveParams)

_list("/v1/customers", "customer", p.CustomerListParams, email="email")
_list("/v1/events", "event", p.EventListParams, type="type")
_list(
    "/v1/checkout/sessions",
    "checkout.session",
    checkout.SessionListParams,
    customer="customer",
    payment_intent="payment_intent",
    status="status",
)
_list("/v1/payment_intents", "payment_intent", p.PaymentIntentListParams, customer="customer")
_list(
    "/v1/charges",
    "charge",
    p.ChargeListParams,
    customer="customer",
    payment_intent="payment_intent",
)
_list(
    "/v1/refunds",
    "refund",
    p.RefundListParams,
    charge="charge",
    payment_intent="payment_intent",
)
_list(
    "/v1/disputes",
    "dispute",
    p.DisputeListParams,
    charge="charge",
    payment_intent="payment_intent",
)
_list(
    "/v1/invoices",
    "invoice",
    p.InvoiceListParams,
    customer="customer",
    status="status",
    collection_method="collection_method",
)
_list(
    "/v1/balance_transactions",
    "balance_transaction",
    p.BalanceTransactionListParams,
    type="type",
    source="source",
    currency="currency",
)


# Customers


@route("POST", "/v1/customers", p.CustomerCreateParams)
def create_customer(account: Account, params: Object) -> Object:
    customer = objects.customer(account.new_id("cus"), account.clock.now())
    for name in ("name", "email", "description", "metadata"):
        customer[name] = params.get(name, customer[name])
    account.add(customer)
    account.emit("customer.created", customer)
    return customer


@route("GET", "/v1/customers/{id}", p.CustomerRetrieveParams)
def get_customer(account: Account, params: Object, id: str) -> Object:
    customer = account.get("customer", id)
    if customer.get("deleted"):
        return {"id": id, "object": "customer", "deleted": True}
    return customer


@route("POST", "/v1/customers/{id}", p.CustomerUpdateParams)
def update_customer(account: Account, params: Object, id: str) -> Object:
    customer = _customer(account, id)
    for name in ("name", "email", "description"):
        customer[name] = params.get(name, customer[name])
    customer["metadata"] |= params.get("metadata", {})
    customer["invoice_settings"] |= params.get("invoice_settings", {})
    account.emit("customer.updated", customer)
    return customer


@route("GET", "/v1/customers/{id}/payment_methods", p.CustomerPaymentMethodListParams)
def list_payment_methods(account: Account, params: Object, id: str) -> Object:
    found = [each for each in account.all("payment_method") if each["customer"] == id]
    return page(found[::-1], params, f"/v1/customers/{id}/payment_methods")


@route("POST", "/v1/billing_portal/sessions", billing_portal.SessionCreateParams)
def create_portal(account: Account, params: Object) -> Object:
    customer = _customer(account, _needed(params, "customer"))
    id = account.new_id("bps")
    url = f"{account.base_url}/portal/{id}"
    session = objects.portal_session(
        id, account.clock.now(), customer["id"], params.get("return_url", ""), url
    )
    return account.add(session)


@route("GET", "/v1/invoice_payments", p.InvoicePaymentListParams)
def list_invoice_payments(account: Account, params: Object) -> Object:
    paid_with = params.get("payment", {}).get("payment_intent")
    found = [
        each
        for each in account.all("invoice_payment")
        if paid_with in (None, each["payment"]["payment_intent"])
        and params.get("invoice", each["invoice"]) == each["invoice"]
    ]
    return page(found[::-1], params, "/v1/invoice_payments")


# Checkout and payments


@route("POST", "/v1/checkout/sessions", checkout.SessionCreateParams)
def create_checkout(account: Account, params: Object) -> Object:
    if _needed(params, "mode") != "payment":
        raise invalid("Only payment sessions are known here", "mode")
    _needed(params, "success_url")
    for line in _needed(params, "line_items"):
        _needed(line, "price_data", "line_items[0]")
        payments.check_amount(_needed(line["price_data"], "unit_amount", "price_data"))
    if "customer" in params:
        _customer(account, params["customer"])
    id = account.new_id("cs_test")
    session = objects.checkout_session(
        id, account.clock.now(), f"{account.base_url}/pay/{id}", params
    )
    account.add(session)
    account.intent_params[id] = params.get("payment_intent_data", {})
    return session


@route("POST", "/v1/checkout/sessions/{id}/expire", checkout.SessionExpireParams)
def expire_checkout(account: Account, params: Object, id: str) -> Object:
    return payments.expire_checkout(account, account.get("checkout.session", id))


@route("POST", "/v1/payment_intents", p.PaymentIntentCreateParams)
def create_payment(account: Account, params: Object) -> Object:
    payments.check_amount(params["amount"])
    if params.get("off_session") and not params.get("confirm"):
        raise invalid("You can only use `off_session` with `confirm=true`.", "off_session")
    method = None
    if "customer" in params:
        _customer(account, params["customer"])
    if "payment_method" in params:
        method = _method_of(account, params["payment_method"], params.get("customer"))
    amount, currency = params["amount"], params["currency"]
    intent = payments.new_intent(account, amount, currency, params.get("customer"))
    intent["metadata"] = params.get("metadata", {})
    intent["description"] = params.get("description")
    if params.get("confirm"):
        if method is None:
            raise invalid("A payment method is needed to confirm", "payment_method")
        payments.confirm(account, intent, method, is_off_session=bool(params.get("off_session")))
        if intent["status"] == "requires_payment_method":
            raise payments.declined(intent)
    return intent


@route("POST", "/v1/refunds", p.RefundCreateParams)
def create_refund(account: Account, params: Object) -> Object:
    if "charge" in params:
        charge = account.get("charge", params["charge"], "charge")
    else:
        intent_id = _needed(params, "payment_intent")
        intent = account.get("payment_intent", intent_id, "payment_intent")
        if intent["status"] != "succeeded":
            raise refused("This PaymentIntent does not have a successful charge to refund.")
        charge = account.get("charge", intent["latest_charge"])
    if params.get("amount", 1) < 1:
        raise invalid("Invalid positive integer", "amount", "parameter_invalid_integer")
    return payments.refund(account, charge, params.get("amount"), params.get("metadata", {}))


# Invoices


@route("POST", "/v1/invoices", p.InvoiceCreateParams)
def create_invoice(account: Account, params: Object) -> Object:
    customer = _customer(account, _needed(params, "customer"))
    if "default_payment_method" in params:
        _method_of(account, params["default_payment_method"], customer["id"])
    return invoices.create(account, customer, params)


@route("DELETE", "/v1/invoices/{id}", p.InvoiceDeleteParams)
def delete_invoice(account: Account, params: Object, id: str) -> Object:
    invoice = account.get("invoice", id)
    invoices.check_draft(invoice)
    account.remove(id)
    account.emit("invoice.deleted", invoice)
    return {"id": id, "object": "invoice", "deleted": True}


@route("GET", "/v1/invoices/{id}/lines", p.InvoiceLineItemListParams)
def list_lines(account: Account, params: Object, id: str) -> Object:
    lines = invoices.all_lines(account, account.get("invoice", id)["id"])
    return page(lines, params, f"/v1/invoices/{id}/lines")


@route("POST", "/v1/invoices/{id}/add_lines", p.InvoiceAddLinesParams)
def add_lines(account: Account, params: Object, id: str) -> Object:
    return invoices.add_lines(account, account.get("invoice", id), params["lines"])


@route("POST", "/v1/invoices/{id}/finalize", p.InvoiceFinalizeInvoiceParams)
def finalize_invoice(account: Account, params: Object, id: str) -> Object:
    invoice = account.get("invoice", id)
    return invoices.finalise(account, invoice, params.get("auto_advance", invoice["auto_advance"]))


@route("POST", "/v1/invoices/{id}/void", p.InvoiceVoidInvoiceParams)
def void_invoice(account: Account, params: Object, id: str) -> Object:
    return invoices.end(account, account.get("invoice", id), "void", ("open", "uncollectible"))


@route("POST", "/v1/invoices/{id}/mark_uncollectible", p.InvoiceMarkUncollectibleParams)
def mark_uncollectible(account: Account, params: Object, id: str) -> Object:
    return invoices.end(account, account.get("invoice", id), "uncollectible", ("open",))


def _customer(account: Account, id: str) -> Object:
    customer = account.get("customer", id, "customer")
    if customer.get("deleted"):
        raise refused(f"No such customer: '{id}'", "resource_missing")
    return customer


def _method_of(account: Account, id: str, customer_id: str | None) -> Object:
    method = account.get("payment_method", id, "payment_method")
    if method["customer"] != customer_id:
        raise refused("The PaymentMethod does not belong to this customer.")
    return method


def _needed(params: Object, name: str, path: str = "") -> Any:
    """What the SDK's types leave optional, but this use needs."""
    if name not in params:
        where = f"{path}[{name}]" if path else name
        raise invalid(f"Missing required param: {where}.", where, "parameter_missing")
    return params[name]
