"""Our calls of Stripe, over real HTTP with the real SDK, against the stand-in."""

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from app.billing import stripe_objects as objects
from app.billing.stripe import API_VERSION, Stripe
from app.billing.stripe_errors import StripeRejected, StripeUnknown
from app.billing.stripe_invoices import MAX_INVOICE_LINES
from app.billing.stripe_objects import LineParams
from tests.stripe_stand_in import payments
from tests.stripe_stand_in.server import StandIn


@pytest.fixture
def since() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def customer(stripe_client: Stripe) -> objects.Customer:
    return stripe_client.create_customer(
        "customer:org_1", organization_id="org_1", name="Acme", email="pay@acme.test"
    )


def new_checkout(stripe: Stripe, customer_id: str, top_up_id: str = "top_1") -> objects.Checkout:
    return stripe.create_checkout(
        f"checkout:{top_up_id}",
        customer_id=customer_id,
        amount_cents=2500,
        currency="USD",
        top_up_id=top_up_id,
        success_url="https://box.test/done",
        cancel_url="https://box.test/back",
    )


def charge(
    stripe: Stripe, customer_id: str, method_id: str, top_up_id: str = "top_2"
) -> objects.Payment:
    return stripe.charge_saved_card(
        f"charge:{top_up_id}",
        customer_id=customer_id,
        payment_method_id=method_id,
        amount_cents=1000,
        currency="USD",
        top_up_id=top_up_id,
    )


def paid(stripe: Stripe, stand_in: StandIn, customer_id: str) -> objects.Payment:
    """A payment through Checkout."""
    checkout = new_checkout(stripe, customer_id)
    stand_in.pay_checkout(checkout.id)
    return stripe.get_payment(stripe.get_checkout(checkout.id).payment_intent_id)


def test_a_customer_is_found_by_our_id(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer, since: datetime
) -> None:
    again = stripe_client.create_customer(
        "customer:org_1", organization_id="org_1", name="Acme", email="pay@acme.test"
    )
    assert again == customer == stripe_client.get_customer(customer.id)
    assert customer.organization_id == "org_1"
    assert stripe_client.find_customer("org_1", since) == customer
    assert stripe_client.find_customer("org_2") is None
    stripe_stand_in.delete_customer(customer.id)
    assert stripe_client.get_customer(customer.id).is_deleted
    assert stripe_client.find_customer("org_1") is None


def test_looking_allows_for_clocks_that_differ(
    stripe_client: Stripe, stripe_stand_in: StandIn, since: datetime
) -> None:
    stripe_stand_in.clock.advance(-300)
    made = stripe_client.create_customer("k", organization_id="o", name="n", email="")
    assert stripe_client.find_customer("o", since) == made
    assert [event.object_id for event in stripe_client.list_events(since)] == [made.id]


def test_a_customer_may_have_no_address(stripe_client: Stripe) -> None:
    made = stripe_client.create_customer("k", organization_id="o", name="No address", email="")
    assert made.email == ""


def test_looking_goes_through_all_pages(stripe_client: Stripe) -> None:
    for number in range(103):
        stripe_client.create_customer(
            f"k{number}", organization_id=f"org_{number}", name="n", email=""
        )
    first = stripe_client.find_customer("org_0")
    assert first is not None
    assert first.organization_id == "org_0"


def test_checkout_is_credited_only_once_it_is_paid(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer, since: datetime
) -> None:
    checkout = new_checkout(stripe_client, customer.id)
    assert checkout.status == "open"
    assert checkout.url.startswith(stripe_stand_in.url)
    assert stripe_client.find_checkout("top_1", since, customer.id) == checkout
    assert stripe_client.find_checkout("top_9", since) is None
    stripe_stand_in.pay_checkout(checkout.id)
    checkout = stripe_client.get_checkout(checkout.id)
    assert (checkout.status, checkout.payment_status, checkout.url) == ("complete", "paid", "")
    payment = stripe_client.get_payment(checkout.payment_intent_id)
    assert payment.is_paid
    assert (payment.amount_received_cents, payment.currency) == (2500, "usd")
    assert (payment.card_label, payment.top_up_id) == ("Visa ending 4242", "top_1")
    assert stripe_client.find_payment("top_1", since, customer.id) == payment
    # The card can be charged again without the customer.
    assert charge(stripe_client, customer.id, payment.payment_method_id).is_paid


def test_checkout_keeps_the_card_and_our_id_on_the_payment(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    new_checkout(stripe_client, customer.id)
    [request] = stripe_stand_in.requests_to("/v1/checkout/sessions")
    intent = request.params["payment_intent_data"]
    assert intent["setup_future_usage"] == "off_session"
    assert intent["metadata"]["top_up_id"] == request.params["metadata"]["top_up_id"] == "top_1"
    [line] = request.params["line_items"]
    assert line["price_data"]["currency"] == "usd"
    assert line["price_data"]["unit_amount"] == "2500"


def test_a_declined_card_leaves_the_page_open(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    checkout = new_checkout(stripe_client, customer.id)
    stripe_stand_in.pay_checkout(checkout.id, "4000000000009995")
    checkout = stripe_client.get_checkout(checkout.id)
    assert (checkout.status, checkout.payment_status) == ("open", "unpaid")
    payment = stripe_client.get_payment(checkout.payment_intent_id)
    assert not payment.is_over
    assert payment.error_code == "insufficient_funds"
    stripe_stand_in.pay_checkout(checkout.id)
    assert stripe_client.get_checkout(checkout.id).payment_status == "paid"


@pytest.mark.parametrize("is_passed", [True, False])
def test_a_bank_may_ask_the_customer(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer, is_passed: bool
) -> None:
    checkout = new_checkout(stripe_client, customer.id)
    session = stripe_stand_in.pay_checkout(checkout.id, payments.NEEDS_AUTHENTICATION_ONCE)
    payment_id = session["payment_intent"]
    assert stripe_client.get_payment(payment_id).status == "requires_action"
    stripe_stand_in.authenticate(payment_id, is_passed)
    assert stripe_client.get_payment(payment_id).is_paid is is_passed
    status = stripe_client.get_checkout(checkout.id).status
    assert status == ("complete" if is_passed else "open")


@pytest.mark.parametrize("is_paid", [True, False])
def test_a_debit_is_paid_days_after_checkout(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer, is_paid: bool
) -> None:
    checkout = new_checkout(stripe_client, customer.id)
    stripe_stand_in.pay_checkout(checkout.id, payments.SEPA_DEBIT)
    checkout = stripe_client.get_checkout(checkout.id)
    assert (checkout.status, checkout.payment_status) == ("complete", "unpaid")
    payment = stripe_client.get_payment(checkout.payment_intent_id)
    assert (payment.status, payment.is_paid, payment.is_over) == ("processing", False, False)
    assert payment.card_label == "Sepa debit"
    stripe_stand_in.settle_payment(payment.id, is_paid)
    assert stripe_client.get_payment(payment.id).is_paid is is_paid
    name = "succeeded" if is_paid else "failed"
    assert stripe_stand_in.events(f"checkout.session.async_payment_{name}")


def test_an_open_checkout_can_be_ended(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    checkout = new_checkout(stripe_client, customer.id)
    assert stripe_client.expire_checkout(checkout.id).status == "expired"
    with pytest.raises(StripeRejected, match="status of expired"):
        stripe_client.expire_checkout(checkout.id)
    other = new_checkout(stripe_client, customer.id, "top_2")
    stripe_stand_in.clock.advance(86400)
    stripe_stand_in.let_time_pass()
    assert stripe_client.get_checkout(other.id).status == "expired"


@pytest.mark.parametrize(
    ("card", "code", "decline_code"),
    [
        (payments.FAILS_LATER, "card_declined", "generic_decline"),
        ("4000000000009995", "card_declined", "insufficient_funds"),
        (payments.NEEDS_AUTHENTICATION, "authentication_required", "authentication_required"),
    ],
)
def test_a_declined_charge_says_why(
    stripe_client: Stripe,
    stripe_stand_in: StandIn,
    customer: objects.Customer,
    since: datetime,
    card: str,
    code: str,
    decline_code: str,
) -> None:
    method = stripe_stand_in.save_card(customer.id, card)
    with pytest.raises(StripeRejected) as caught:
        charge(stripe_client, customer.id, method["id"])
    assert (caught.value.code, caught.value.decline_code) == (code, decline_code)
    found = stripe_client.find_payment("top_2", since)
    assert found is not None
    assert (found.id, found.is_paid) == (caught.value.payment_id, False)
    # Under the same key it is not tried again, even with money on the card.
    stripe_stand_in.change_card(method["id"], payments.GOOD_CARD)
    with pytest.raises(StripeRejected):
        charge(stripe_client, customer.id, method["id"])


def test_the_payment_that_came_through_is_found_first(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer, since: datetime
) -> None:
    method = stripe_stand_in.save_card(customer.id)
    good = charge(stripe_client, customer.id, method["id"])
    stripe_stand_in.change_card(method["id"], payments.FAILS_LATER)
    stripe_stand_in.prune_keys()
    with pytest.raises(StripeRejected):
        charge(stripe_client, customer.id, method["id"])
    assert stripe_client.find_payment("top_2", since) == good


def test_what_is_not_there_is_rejected(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    method = stripe_stand_in.save_card(customer.id)
    stripe_stand_in.remove_card(method["id"])
    with pytest.raises(StripeRejected, match="does not belong"):
        charge(stripe_client, customer.id, method["id"])
    with pytest.raises(StripeRejected) as caught:
        stripe_client.get_payment("pi_none")
    assert caught.value.code == "resource_missing"


def test_refunds_are_found_by_their_key(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    payment = paid(stripe_client, stripe_stand_in, customer.id)
    first = stripe_client.refund(
        "refund:1", payment_id=payment.id, amount_cents=500, top_up_id="top_1"
    )
    assert (first.amount_cents, first.status, first.top_up_id) == (500, "succeeded", "top_1")
    assert stripe_client.get_refund(first.id) == first
    assert stripe_client.find_refund(payment.id, "refund:1") == first
    assert stripe_client.find_refund(payment.id, "refund:2") is None
    stripe_stand_in.refund_by_hand(payment.id, 300)
    by_hand, _ = stripe_client.list_refunds(payment.id)
    assert (by_hand.amount_cents, by_hand.operation_key) == (300, "")
    assert stripe_client.get_payment(payment.id).refunded_cents == 800
    with pytest.raises(StripeRejected, match="greater than unrefunded"):
        stripe_client.refund(
            "refund:3", payment_id=payment.id, amount_cents=1701, top_up_id="top_1"
        )
    stripe_stand_in.fail_refund(first.id)
    assert stripe_client.get_refund(first.id).status == "failed"
    assert stripe_client.get_payment(payment.id).refunded_cents == 300


@pytest.mark.parametrize(("is_won", "withdrawn"), [(True, 0), (False, 2500)])
def test_a_dispute_withdraws_money_until_it_is_won(
    stripe_client: Stripe,
    stripe_stand_in: StandIn,
    customer: objects.Customer,
    is_won: bool,
    withdrawn: int,
) -> None:
    payment = paid(stripe_client, stripe_stand_in, customer.id)
    opened = stripe_stand_in.open_dispute(payment.id)
    dispute = stripe_client.get_dispute(opened["id"])
    assert (dispute.payment_id, dispute.charge_id) == (payment.id, payment.charge_id)
    assert dispute.is_funds_withdrawn
    assert not dispute.is_over
    assert (dispute.withdrawn_cents, dispute.fee_cents) == (2500, 1500)
    assert stripe_client.get_payment(payment.id).is_disputed
    with pytest.raises(StripeRejected) as caught:
        stripe_client.refund("r", payment_id=payment.id, amount_cents=1, top_up_id="top_1")
    assert caught.value.code == "charge_disputed"
    end = stripe_stand_in.win_dispute if is_won else stripe_stand_in.lose_dispute
    end(dispute.id)
    [dispute] = stripe_client.list_disputes(payment.id)
    assert dispute.status == ("won" if is_won else "lost")
    assert dispute.is_over
    assert (dispute.withdrawn_cents, dispute.fee_cents) == (withdrawn, 1500)


def test_an_inquiry_withdraws_nothing(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    payment = paid(stripe_client, stripe_stand_in, customer.id)
    opened = stripe_stand_in.open_dispute(payment.id, is_inquiry=True)
    dispute = stripe_client.get_dispute(opened["id"])
    assert not dispute.is_funds_withdrawn
    assert dispute.fee_cents == 0
    stripe_stand_in.win_dispute(dispute.id)
    assert stripe_client.get_dispute(dispute.id).is_over


def test_the_portal_is_a_page_at_stripe(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    url = stripe_client.create_portal(customer_id=customer.id, return_url="https://box.test/b")
    assert url.startswith(f"{stripe_stand_in.url}/portal/bps_")


def test_the_balance_is_the_sum_of_its_transactions(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer, since: datetime
) -> None:
    payment = paid(stripe_client, stripe_stand_in, customer.id)
    stripe_client.refund("r", payment_id=payment.id, amount_cents=500, top_up_id="top_1")
    dispute = stripe_stand_in.open_dispute(payment.id, 1000)
    stripe_stand_in.win_dispute(dispute["id"])
    moves = list(stripe_client.list_balance_transactions(since))
    assert [move.type for move in moves] == ["charge", "refund", "adjustment", "adjustment"]
    assert [move.payment_id for move in moves] == [payment.id] * 4
    assert [move.amount_cents for move in moves] == [2500, -500, -1000, 1000]
    assert sum(move.net_cents for move in moves) == 2500 - 103 - 500 - 1500
    assert list(stripe_client.list_balance_transactions(since, moves[1].id)) == moves[2:]
    assert stripe_client.get_balance_transaction(payment.balance_transaction_id) == moves[0]


def test_events_are_listed_oldest_first_for_thirty_days(
    stripe_client: Stripe, stripe_stand_in: StandIn, since: datetime
) -> None:
    for number in range(130):
        stripe_client.create_customer(f"k{number}", organization_id="o", name="n", email="")
    events = list(stripe_client.list_events(since))
    assert [event.id for event in events] == [event["id"] for event in stripe_stand_in.events()]
    assert (events[0].type, events[0].object_kind) == ("customer.created", "customer")
    assert list(stripe_client.list_events(since, events[9].id)) == events[10:]
    assert not list(stripe_client.list_events(since, types=["invoice.paid"]))
    assert len(list(stripe_client.list_events(since, types=["customer.created"]))) == 130
    assert not list(stripe_client.list_events(since + timedelta(days=1)))
    stripe_stand_in.clock.advance(30 * 86400 + 60)
    assert not list(stripe_client.list_events(since))


def test_money_goes_to_stripe_in_whole_cents_only(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    for amount in (Decimal("10.5"), Decimal("0.00000075"), 7.5e-7, "100", True):
        with pytest.raises(AssertionError, match="not whole cents"):
            stripe_client.refund("k", payment_id="pi_1", amount_cents=amount, top_up_id="t")  # type: ignore[arg-type]
    payment = paid(stripe_client, stripe_stand_in, customer.id)
    charge(stripe_client, customer.id, payment.payment_method_id)
    stripe_client.refund("r", payment_id=payment.id, amount_cents=1, top_up_id="top_1")
    draft = new_invoice(stripe_client, customer.id)
    lines = [LineParams("Usage", 99_999_999), LineParams("Credit", -1)]
    stripe_client.add_invoice_lines("l", stripe_invoice_id=draft.id, lines=lines)
    sent = re.findall(r"'(?:amount|unit_amount)': '([^']*)'", str(stripe_stand_in.requests))
    assert sorted(sent) == sorted(["2500", "1000", "1", "99999999", "-1"])


def new_invoice(
    stripe: Stripe, customer_id: str, *, is_automatic: bool = True, method_id: str = ""
) -> objects.Invoice:
    return stripe.create_invoice(
        "invoice:inv_1",
        customer_id=customer_id,
        currency="USD",
        invoice_id="inv_1",
        description="November 2026",
        is_automatic=is_automatic,
        payment_method_id=method_id,
    )


def test_an_automatic_invoice_is_charged_to_the_card(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer, since: datetime
) -> None:
    method = stripe_stand_in.save_card(customer.id)
    draft = new_invoice(stripe_client, customer.id, method_id=method["id"])
    assert (draft.status, draft.total_cents, draft.num_lines) == ("draft", 0, 0)
    lines = [LineParams("Input", 300, {"position": "0"}), LineParams("Output", 700)]
    added = stripe_client.add_invoice_lines("lines:inv_1", stripe_invoice_id=draft.id, lines=lines)
    assert (added.status, added.total_cents, added.num_lines) == ("draft", 1000, 2)
    listed = stripe_client.list_invoice_lines(draft.id)
    assert [(line.description, line.amount_cents) for line in listed] == [
        ("Input", 300),
        ("Output", 700),
    ]
    assert listed[0].metadata == {"position": "0"}
    opened = stripe_client.finalise_invoice("finalise:inv_1", draft.id)
    assert (opened.status, opened.amount_due_cents) == ("open", 1000)
    assert opened.hosted_url
    stripe_stand_in.clock.advance(3601)
    stripe_stand_in.let_time_pass()
    closed = stripe_client.get_invoice(draft.id)
    assert (closed.status, closed.amount_paid_cents, closed.attempt_count) == ("paid", 1000, 1)
    [payment_id] = closed.payment_ids
    assert stripe_client.get_payment(payment_id).amount_received_cents == 1000
    assert stripe_client.find_invoice("inv_1", since, customer.id) == closed
    assert stripe_client.find_invoice("inv_2", since) is None


def test_an_invoice_that_no_card_pays_stays_open(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    draft = new_invoice(stripe_client, customer.id)
    stripe_client.add_invoice_lines(
        "l", stripe_invoice_id=draft.id, lines=[LineParams("Usage", 500)]
    )
    stripe_client.finalise_invoice("f", draft.id)
    stripe_stand_in.collect_invoice(draft.id)
    assert stripe_client.get_invoice(draft.id).status == "open"
    assert stripe_stand_in.events("invoice.payment_failed")
    assert stripe_client.mark_uncollectible("u", draft.id).status == "uncollectible"
    assert stripe_client.void_invoice("v", draft.id).status == "void"


def test_a_draft_waits_until_we_finalise_it(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    draft = new_invoice(stripe_client, customer.id)
    stripe_stand_in.clock.advance(86400)
    stripe_stand_in.let_time_pass()
    assert stripe_client.get_invoice(draft.id).status == "draft"
    [request] = stripe_stand_in.requests_to("/v1/invoices")
    # Nothing that a person left at Stripe for this customer comes onto our invoice.
    assert request.params["pending_invoice_items_behavior"] == "exclude"


def test_finalising_may_fail_and_leaves_a_draft(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    draft = new_invoice(stripe_client, customer.id)
    stripe_client.add_invoice_lines(
        "l", stripe_invoice_id=draft.id, lines=[LineParams("Usage", 500)]
    )
    stripe_stand_in.forbid_finalising(draft.id)
    with pytest.raises(StripeRejected, match="valid customer address"):
        stripe_client.finalise_invoice("f", draft.id)
    assert stripe_client.get_invoice(draft.id).status == "draft"
    assert stripe_stand_in.events("invoice.finalization_failed")
    stripe_stand_in.forbid_finalising(draft.id, is_forbidden=False)
    with pytest.raises(StripeRejected):  # saved under the key, as all that began is
        stripe_client.finalise_invoice("f", draft.id)
    assert stripe_client.finalise_invoice("f2", draft.id).status == "open"


def test_a_sent_invoice_is_paid_on_its_page_or_overdue(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    draft = new_invoice(stripe_client, customer.id, is_automatic=False)
    stripe_client.add_invoice_lines(
        "l", stripe_invoice_id=draft.id, lines=[LineParams("Usage", 500)]
    )
    stripe_client.finalise_invoice("f", draft.id)
    stripe_stand_in.clock.advance(31 * 86400)
    stripe_stand_in.let_time_pass()
    assert stripe_stand_in.events("invoice.overdue")
    stripe_stand_in.pay_invoice(draft.id)
    assert stripe_client.get_invoice(draft.id).status == "paid"


def test_a_sent_invoice_needs_an_address(stripe_client: Stripe) -> None:
    nobody = stripe_client.create_customer("k", organization_id="o", name="n", email="")
    with pytest.raises(StripeRejected, match="Missing email"):
        new_invoice(stripe_client, nobody.id, is_automatic=False)


def test_many_lines_go_in_several_calls_each_with_its_key(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    draft = new_invoice(stripe_client, customer.id)
    lines = [LineParams(f"Line {n}", n) for n in range(MAX_INVOICE_LINES)]
    # The second call's answer is lost: the same keys complete what is missing, and no more.
    stripe_stand_in.faults.add("lose_reply", "add_lines", skip=1)
    with pytest.raises(StripeUnknown):
        stripe_client.add_invoice_lines("l", stripe_invoice_id=draft.id, lines=lines)
    added = stripe_client.add_invoice_lines("l", stripe_invoice_id=draft.id, lines=lines)
    assert added.total_cents == sum(range(MAX_INVOICE_LINES))
    assert added.num_lines is None  # Stripe shows only some of them with the invoice
    listed = stripe_client.list_invoice_lines(draft.id)
    assert [line.description for line in listed] == [line.description for line in lines]
    keys = [r.key for r in stripe_stand_in.requests_to(f"/v1/invoices/{draft.id}/add_lines")]
    assert keys == ["l:0", "l:100", "l:0", "l:100", "l:200"]
    with pytest.raises(StripeRejected, match="at most 250"):
        stripe_client.add_invoice_lines("m", stripe_invoice_id=draft.id, lines=lines[:1])


def test_a_line_that_a_person_added_shows(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    draft = new_invoice(stripe_client, customer.id)
    stripe_client.add_invoice_lines(
        "l", stripe_invoice_id=draft.id, lines=[LineParams("Usage", 500, {"position": "0"})]
    )
    stripe_stand_in.add_line_by_hand(draft.id, 7, "Coffee")
    altered = stripe_client.get_invoice(draft.id)
    assert (altered.total_cents, altered.num_lines) == (507, 2)
    assert stripe_client.list_invoice_lines(draft.id)[1].metadata == {}


def test_a_draft_can_be_deleted_twice_an_open_invoice_never(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    draft = new_invoice(stripe_client, customer.id)
    stripe_client.delete_draft(draft.id)
    stripe_client.delete_draft(draft.id)
    stripe_stand_in.prune_keys()
    other = new_invoice(stripe_client, customer.id)
    stripe_client.add_invoice_lines(
        "l", stripe_invoice_id=other.id, lines=[LineParams("Usage", 500)]
    )
    stripe_client.finalise_invoice("f", other.id)
    with pytest.raises(StripeRejected) as caught:
        stripe_client.delete_draft(other.id)
    assert caught.value.code == "invoice_not_editable"
    with pytest.raises(StripeRejected):
        stripe_client.add_invoice_lines(
            "m", stripe_invoice_id=other.id, lines=[LineParams("More", 1)]
        )


def test_too_little_to_charge_goes_on_the_next_invoice(
    stripe_client: Stripe, stripe_stand_in: StandIn, customer: objects.Customer
) -> None:
    small = new_invoice(stripe_client, customer.id)
    stripe_client.add_invoice_lines(
        "l", stripe_invoice_id=small.id, lines=[LineParams("Usage", 30)]
    )
    closed = stripe_client.finalise_invoice("f", small.id)
    assert (closed.status, closed.total_cents, closed.amount_due_cents) == ("paid", 30, 0)
    assert stripe_stand_in.account.get("customer", customer.id)["balance"] == 30


def test_every_request_names_the_version_of_the_sdk(
    stripe_client: Stripe, customer: objects.Customer
) -> None:
    # The stand-in refuses any other.
    assert API_VERSION == "2026-10-28.endive"
    assert stripe_client.get_customer(customer.id) == customer
