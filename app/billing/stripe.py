"""Stripe, as far as this box uses it: the one module that speaks to its SDK.

Owns the client, retries and what errors mean. When something is done, and how often, is decided
in `payments/`. The calls block: run them in threads, with no database transaction open.

Every `key` is an idempotency key: the same call with the same key happens once within 24 hours. The
SDK repeats only what reads; what has a key is repeated by the outbox, which looks for it first.
Raises the errors of `stripe_errors.py`, and only those.
"""

import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import datetime
from ssl import SSLCertVerificationError
from typing import Any

import stripe
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from app.billing import stripe_objects as objects
from app.billing.stripe_errors import (
    StripeBusy,
    StripeError,
    StripeKeyReused,
    StripeRejected,
    StripeUnauthorized,
    StripeUnknown,
    StripeUnreachable,
)
from app.billing.stripe_invoices import StripeInvoices, whole_cents
from app.billing.stripe_lists import PAGE, StripeLists, created_from, once
from app.billing.stripe_objects import Checkout, Customer, Dispute, Payment, Refund

API_VERSION = stripe.api_version

_MAX_MESSAGE = 280
_PAYMENT_PARTS = ["latest_charge", "payment_method"]


class Stripe(StripeInvoices, StripeLists):
    """One account at Stripe. Safe to use from several threads. `max_retries` is of calls without
    a key."""

    def __init__(
        self,
        api_key: str,
        api_base: str = "",
        *,
        timeout_seconds: int = 20,
        max_retries: int = 2,
    ) -> None:
        stripe.enable_telemetry = False  # it would write a file and tell Stripe of this machine
        self._http = _HttpClient(timeout=timeout_seconds)
        self._client = stripe.StripeClient(
            api_key,
            base_addresses={"api": api_base} if api_base else None,
            stripe_version=API_VERSION,
            max_network_retries=max_retries,
            http_client=self._http,
        )
        self._v1 = self._client.v1
        self.is_live = "_live_" in api_key

    # Customers

    def create_customer(self, key: str, *, organization_id: str, name: str, email: str) -> Customer:
        params: stripe.params.CustomerCreateParams = {
            "name": name,
            "metadata": {"organization_id": organization_id, "operation_key": key},
        }
        if email:
            params["email"] = email
        with self._call():
            customer = self._v1.customers.create(params, once(key))
        return objects.read_customer(_data(customer))

    def update_customer(self, key: str, *, customer_id: str, email: str) -> Customer:
        """`email` "" takes the address away."""
        with self._call():
            customer = self._v1.customers.update(customer_id, {"email": email}, once(key))
        return objects.read_customer(_data(customer))

    def get_customer(self, customer_id: str) -> Customer:
        with self._call():
            return objects.read_customer(_data(self._v1.customers.retrieve(customer_id)))

    def find_customer(self, organization_id: str, since: datetime | None = None) -> Customer | None:
        """The customer that carries our organization's id. Reads all customers since then."""
        params: stripe.params.CustomerListParams = {"limit": PAGE}
        if since is not None:
            params["created"] = {"gte": created_from(since)}
        with self._call():
            for found in self._v1.customers.list(params).auto_paging_iter():
                customer = objects.read_customer(_data(found))
                if customer.organization_id == organization_id:
                    return customer
        return None

    def create_portal(self, *, customer_id: str, return_url: str) -> str:
        """The address of a page at Stripe where the customer manages cards and sees invoices. It
        is good for one visit, soon."""
        with self._call():
            session = self._v1.billing_portal.sessions.create(
                {"customer": customer_id, "return_url": return_url}
            )
        return session.url

    # Checkout and payments

    def create_checkout(
        self,
        key: str,
        *,
        customer_id: str,
        amount_cents: int,
        currency: str,
        top_up_id: str,
        success_url: str,
        cancel_url: str,
    ) -> Checkout:
        """A page at Stripe that takes one payment and keeps the card for later ones."""
        metadata = {"top_up_id": top_up_id, "operation_key": key}
        params: stripe.params.checkout.SessionCreateParams = {
            "mode": "payment",
            "customer": customer_id,
            "client_reference_id": top_up_id,
            "line_items": [
                {
                    "quantity": 1,
                    "price_data": {
                        "currency": currency.lower(),
                        "unit_amount": whole_cents(amount_cents),
                        "product_data": {"name": "Credit"},
                    },
                }
            ],
            "metadata": metadata,
            "payment_intent_data": {"setup_future_usage": "off_session", "metadata": metadata},
            "success_url": success_url,
            "cancel_url": cancel_url,
        }
        with self._call():
            session = self._v1.checkout.sessions.create(params, once(key))
        return objects.read_checkout(_data(session))

    def get_checkout(self, checkout_id: str) -> Checkout:
        with self._call():
            return objects.read_checkout(_data(self._v1.checkout.sessions.retrieve(checkout_id)))

    def expire_checkout(self, checkout_id: str) -> Checkout:
        """Ends an open session, so that it can no longer be paid. Rejected when it is not open."""
        with self._call():
            return objects.read_checkout(_data(self._v1.checkout.sessions.expire(checkout_id)))

    def find_checkout(
        self, top_up_id: str, since: datetime, customer_id: str = ""
    ) -> Checkout | None:
        params: stripe.params.checkout.SessionListParams = {"limit": PAGE}
        params["created"] = {"gte": created_from(since)}
        if customer_id:
            params["customer"] = customer_id
        with self._call():
            for found in self._v1.checkout.sessions.list(params).auto_paging_iter():
                checkout = objects.read_checkout(_data(found))
                if checkout.top_up_id == top_up_id:
                    return checkout
        return None

    def charge_saved_card(
        self,
        key: str,
        *,
        customer_id: str,
        payment_method_id: str,
        amount_cents: int,
        currency: str,
        top_up_id: str,
    ) -> Payment:
        """Charges while the customer is away. A decline is a StripeRejected with a `payment_id`,
        and its code authentication_required means that the customer must be there."""
        params: stripe.params.PaymentIntentCreateParams = {
            "amount": whole_cents(amount_cents),
            "currency": currency.lower(),
            "customer": customer_id,
            "payment_method": payment_method_id,
            "confirm": True,
            "off_session": True,
            "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
            "metadata": {"top_up_id": top_up_id, "operation_key": key},
            "expand": _PAYMENT_PARTS,
        }
        with self._call():
            payment = self._v1.payment_intents.create(params, once(key))
        return objects.read_payment(_data(payment))

    def get_payment(self, payment_id: str) -> Payment:
        with self._call():
            payment = self._v1.payment_intents.retrieve(payment_id, {"expand": _PAYMENT_PARTS})
        return objects.read_payment(_data(payment))

    def find_payment(
        self, top_up_id: str, since: datetime, customer_id: str = ""
    ) -> Payment | None:
        """The payment for a top-up; one that came through before one that did not."""
        params: stripe.params.PaymentIntentListParams = {
            "limit": PAGE,
            "created": {"gte": created_from(since)},
            "expand": [f"data.{part}" for part in _PAYMENT_PARTS],
        }
        if customer_id:
            params["customer"] = customer_id
        unpaid: Payment | None = None
        with self._call():
            for found in self._v1.payment_intents.list(params).auto_paging_iter():
                payment = objects.read_payment(_data(found))
                if payment.top_up_id == top_up_id:
                    if payment.is_paid:
                        return payment
                    unpaid = unpaid or payment
        return unpaid

    # Refunds and disputes

    def refund(self, key: str, *, payment_id: str, amount_cents: int, top_up_id: str) -> Refund:
        params: stripe.params.RefundCreateParams = {
            "payment_intent": payment_id,
            "amount": whole_cents(amount_cents),
            "metadata": {"top_up_id": top_up_id, "operation_key": key},
        }
        with self._call():
            refund = self._v1.refunds.create(params, once(key))
        return objects.read_refund(_data(refund))

    def get_refund(self, refund_id: str) -> Refund:
        with self._call():
            return objects.read_refund(_data(self._v1.refunds.retrieve(refund_id)))

    def list_refunds(self, payment_id: str) -> list[Refund]:
        """All refunds of a payment, also those made in Stripe's dashboard; the newest first."""
        params: stripe.params.RefundListParams = {"limit": PAGE, "payment_intent": payment_id}
        with self._call():
            found = self._v1.refunds.list(params).auto_paging_iter()
            return [objects.read_refund(_data(refund)) for refund in found]

    def find_refund(self, payment_id: str, operation_key: str) -> Refund | None:
        """The refund that was asked for with this key."""
        refunds = self.list_refunds(payment_id)
        return next((each for each in refunds if each.operation_key == operation_key), None)

    def get_dispute(self, dispute_id: str) -> Dispute:
        with self._call():
            return objects.read_dispute(_data(self._v1.disputes.retrieve(dispute_id)))

    def list_disputes(self, payment_id: str) -> list[Dispute]:
        params: stripe.params.DisputeListParams = {"limit": PAGE, "payment_intent": payment_id}
        with self._call():
            found = self._v1.disputes.list(params).auto_paging_iter()
            return [objects.read_dispute(_data(dispute)) for dispute in found]

    @contextmanager
    def _call(self) -> Generator[None]:
        """Around what asks Stripe: raises our errors in place of the SDK's."""
        self._http.begin()
        try:
            yield
        except stripe.StripeError as error:
            raise _translated(error, self._http.is_in_doubt) from error


class _HttpClient(stripe.RequestsClient):
    """Sends requests, and remembers whether one of a call's attempts may have taken effect: when
    the last is refused for being too many, an earlier one may still have got through."""

    def __init__(self, timeout: int) -> None:
        super().__init__(timeout=timeout)  # pyright: ignore[reportUnknownMemberType]
        self._call = threading.local()

    def begin(self) -> None:
        self._call.is_in_doubt = False

    @property
    def is_in_doubt(self) -> bool:
        # A list may be read on in another thread than it was begun in.
        return getattr(self._call, "is_in_doubt", False)

    def request(
        self, method: str, url: str, headers: Mapping[str, str] | None, post_data: Any = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        try:
            answer = super().request(  # pyright: ignore[reportUnknownMemberType]
                method, url, headers, post_data
            )
        except stripe.APIConnectionError as error:
            self._call.is_in_doubt = self.is_in_doubt or _was_connected(error)
            raise
        # 409: another request with this key is still at work.
        self._call.is_in_doubt = self.is_in_doubt or answer[1] >= 500 or answer[1] == 409
        return answer


def _was_connected(error: stripe.APIConnectionError) -> bool:
    """Whether the request may have reached Stripe: not where no connection was made, or none
    that is known to lead to Stripe."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NewConnectionError | ConnectTimeoutError | SSLCertVerificationError):
            return False
        cause = cause.__cause__ or cause.__context__
    return True


def _translated(error: stripe.StripeError, is_in_doubt: bool) -> StripeError:
    """Ours for the SDK's. What the answers to the last attempt do not settle stays unknown."""
    message = _message(error)
    match error:
        case stripe.IdempotencyError():
            return StripeKeyReused(message)
        case stripe.CardError() | stripe.InvalidRequestError():
            return _rejected(error, message)
        case _ if is_in_doubt:
            is_saved = _header(error, "idempotent-replayed") == "true"
            return StripeUnknown(message, is_saved=is_saved)
        case stripe.RateLimitError():
            seconds = _header(error, "retry-after")
            return StripeBusy(message, int(seconds) if seconds.isdecimal() else 1)
        case stripe.AuthenticationError() | stripe.PermissionError():
            return StripeUnauthorized(message, retry_after_seconds=60)
        case stripe.APIConnectionError():
            return StripeUnreachable(message, retry_after_seconds=5)
        case _:
            return StripeUnknown(message)


def _message(error: stripe.StripeError) -> str:
    if isinstance(error, stripe.APIConnectionError):
        cause = type(error.__cause__).__name__  # the SDK's own text tells to write to Stripe
        if _was_connected(error):
            return f"Stripe did not answer ({cause})"
        return f"Stripe cannot be reached ({cause}): is this machine's network up?"
    return f"Stripe: {error.user_message or error}"[:_MAX_MESSAGE]


def _rejected(error: stripe.CardError | stripe.InvalidRequestError, message: str) -> StripeError:
    body: Any = error.json_body
    detail: dict[str, Any] = body["error"]
    payment: dict[str, Any] = detail.get("payment_intent", {})
    return StripeRejected(
        message,
        code=error.code or "",
        param=detail.get("param") or "",
        decline_code=detail.get("decline_code") or "",
        payment_id=payment.get("id") or "",
    )


def _header(error: stripe.StripeError, name: str) -> str:
    headers: Any = error.headers
    return str(headers.get(name, ""))


def _data(subject: stripe.StripeObject) -> dict[str, Any]:
    return subject.to_dict(for_json=True)
