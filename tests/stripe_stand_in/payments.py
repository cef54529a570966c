"""Payments: Checkout sessions, payment intents, charges, refunds, and what cards answer."""

from tests.stripe_stand_in import objects
from tests.stripe_stand_in.account import Account
from tests.stripe_stand_in.errors import ApiError, Object, invalid, refused

MINIMUM_CENTS = 50

# Numbers of Stripe's test cards -> the decline code; "" = accepted.
GOOD_CARD = "4242424242424242"
NEEDS_AUTHENTICATION = "4000002760003184"  # each time
NEEDS_AUTHENTICATION_ONCE = "4000002500003155"  # not once it was set up for later
FAILS_LATER = "4000000000000341"  # can be saved, and is declined when charged
DECLINES = {
    "4000000000000002": "generic_decline",
    "4000000000009995": "insufficient_funds",
    "4000000000009987": "lost_card",
    "4000000000000069": "expired_card",
    "4000000000000119": "processing_error",
    FAILS_LATER: "generic_decline",
}
SEPA_DEBIT = "sepa_debit"  # collected days later


def fee(amount: int) -> int:
    """2.9 % and 30 cents."""
    return (amount * 29 + 500) // 1000 + 30


def check_amount(amount: int, param: str = "amount") -> None:
    if amount < 1:
        raise invalid("Invalid positive integer", param, "parameter_invalid_integer")
    if amount < MINIMUM_CENTS:
        raise invalid("Amount must be at least $0.50 usd", param, "amount_too_small")
    if amount > 99_999_999:
        raise invalid("Amount must be no more than $999,999.99", param, "amount_too_large")


def save_card(account: Account, customer_id: str, number: str) -> Object:
    """A payment method of a customer."""
    method = objects.payment_method(account.new_id("pm"), account.clock.now(), number)
    method["customer"] = customer_id
    account.cards[method["id"]] = number
    account.add(method)
    account.emit("payment_method.attached", method)
    return method


def new_intent(account: Account, amount: int, currency: str, customer_id: str | None) -> Object:
    intent = objects.payment_intent(account.new_id("pi"), account.clock.now(), amount, currency)
    intent["customer"] = customer_id
    account.add(intent)
    account.emit("payment_intent.created", intent)
    return intent


def confirm(account: Account, intent: Object, method: Object, *, is_off_session: bool) -> None:
    """Tries to pay. Afterwards the intent is succeeded, processing, requires_action (only with
    the customer there) or requires_payment_method with its last error."""
    number = account.cards[method["id"]]
    intent["payment_method"] = method["id"]
    intent["next_action"] = None
    if number == SEPA_DEBIT:
        _begin_processing(account, intent, method)
    elif number in DECLINES:
        decline(account, intent, method, "card_declined", DECLINES[number])
    elif number == NEEDS_AUTHENTICATION or (
        number == NEEDS_AUTHENTICATION_ONCE and not is_off_session
    ):
        if is_off_session:
            decline(account, intent, method, "authentication_required", "authentication_required")
        else:
            intent |= {"status": "requires_action", "next_action": {"type": "use_stripe_sdk"}}
            account.emit("payment_intent.requires_action", intent)
    else:
        succeed(account, intent, method)


def succeed(account: Account, intent: Object, method: Object) -> None:
    """The money has come in."""
    charge = _charge(account, intent, method)
    charge |= {"status": "succeeded", "paid": True, "captured": True}
    charge["amount_captured"] = intent["amount"]
    if not account.is_booking_late:
        book(account, charge)
    intent |= {
        "status": "succeeded",
        "amount_received": intent["amount"],
        "last_payment_error": None,
        "next_action": None,
        "payment_method": method["id"],
    }
    account.emit("charge.succeeded", charge)
    account.emit("payment_intent.succeeded", intent)


def book(account: Account, charge: Object) -> None:
    """Into the balance, less the fee."""
    transaction = account.move("charge", charge["amount"], fee(charge["amount"]), charge)
    charge["balance_transaction"] = transaction["id"]


def decline(account: Account, intent: Object, method: Object, code: str, decline_code: str) -> None:
    charge = _charge(account, intent, method)
    message = f"Your card was declined ({decline_code})."
    charge |= {"status": "failed", "failure_code": code, "failure_message": message}
    intent["status"] = "requires_payment_method"
    intent["payment_method"] = None
    intent["last_payment_error"] = {
        "charge": charge["id"],
        "code": code,
        "decline_code": decline_code,
        "message": message,
        "payment_method": method,
        "type": "card_error",
    }
    account.emit("charge.failed", charge)
    account.emit("payment_intent.payment_failed", intent)


def declined(intent: Object) -> ApiError:
    """The answer to whoever asked for the payment."""
    error = intent["last_payment_error"]
    return ApiError(
        402,
        error["message"],
        type="card_error",
        code=error["code"],
        decline_code=error["decline_code"],
        payment_intent=intent,
    )


def _begin_processing(account: Account, intent: Object, method: Object) -> None:
    charge = _charge(account, intent, method)
    intent["status"] = "processing"
    account.emit("charge.pending", charge)
    account.emit("payment_intent.processing", intent)


def _charge(account: Account, intent: Object, method: Object) -> Object:
    """The pending charge that the intent has, or a new one."""
    last = account.look(intent["latest_charge"]) if intent["latest_charge"] else None
    if last is not None and last["status"] == "pending":
        return last
    charge = objects.charge(account.new_id("ch"), account.clock.now(), intent, method)
    intent["latest_charge"] = charge["id"]
    return account.add(charge)


# Checkout


def complete_checkout(account: Account, session: Object, intent: Object) -> None:
    """Once the customer is through with the page: paid, or on its way."""
    session |= {"status": "complete", "url": None, "payment_intent": intent["id"]}
    session["payment_status"] = "paid" if intent["status"] == "succeeded" else "unpaid"
    account.emit("checkout.session.completed", session)


def expire_checkout(account: Account, session: Object) -> Object:
    if session["status"] != "open":
        raise refused(
            "Only Checkout Sessions with a status in ['open'] can be expired. This Checkout"
            f" Session has a status of {session['status']}."
        )
    session |= {"status": "expired", "url": None}
    account.emit("checkout.session.expired", session)
    return session


# Refunds


def refund(account: Account, charge: Object, amount: int | None, metadata: Object) -> Object:
    """Gives back a part of a charge, or what is left of it."""
    left = charge["amount_captured"] - charge["amount_refunded"]
    if charge["disputed"]:
        raise refused(f"Charge {charge['id']} has been charged back", "charge_disputed")
    if left == 0:
        raise refused(
            f"Charge {charge['id']} has already been refunded.", "charge_already_refunded"
        )
    amount = left if amount is None else amount
    if amount > left:
        raise refused(
            f"Refund amount ({amount}) is greater than unrefunded amount on charge ({left})"
        )
    refunded = objects.refund(account.new_id("re"), account.clock.now(), charge, amount)
    refunded["metadata"] = metadata
    if account.is_refunding_late:
        refunded["status"] = "pending"
    account.add(refunded)
    refunded["balance_transaction"] = account.move("refund", -amount, 0, refunded)["id"]
    charge["amount_refunded"] += amount
    charge["refunded"] = charge["amount_refunded"] == charge["amount"]
    account.emit("refund.created", refunded)
    account.emit("charge.refunded", charge)
    return refunded


def fail_refund(account: Account, refunded: Object) -> None:
    """The bank sent it back: the money is in the balance again."""
    charge = account.get("charge", refunded["charge"])
    refunded |= {"status": "failed", "failure_reason": "expired_or_canceled_card"}
    transaction = account.move("refund_failure", refunded["amount"], 0, refunded)
    refunded["failure_balance_transaction"] = transaction["id"]
    charge["amount_refunded"] -= refunded["amount"]
    charge["refunded"] = False
    account.emit("refund.failed", refunded)
    account.emit("charge.refund.updated", refunded)
