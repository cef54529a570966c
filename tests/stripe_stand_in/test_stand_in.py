"""The stand-in itself: where it is stricter than a mock, and what it does on demand."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
import stripe
from hypothesis import given
from hypothesis import strategies as st
from stripe._encode import _api_encode
from stripe.params import checkout

from app.billing.stripe import Stripe
from app.billing.stripe_errors import BadSignature
from app.billing.stripe_events import parse_event
from tests.stripe_stand_in import parameters, routes
from tests.stripe_stand_in.errors import ApiError
from tests.stripe_stand_in.server import StandIn
from tests.stripe_stand_in.webhooks import RETRY_SECONDS, Delivery


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """Unlike `stripe_stand_in` this one may see wrong parameters."""
    with StandIn() as stand_in:
        yield stand_in
        assert not stand_in.crashes, stand_in.crashes[0]


@pytest.fixture
def sdk(stand_in: StandIn) -> stripe.V1Services:
    return stripe.StripeClient(stand_in.api_key, base_addresses={"api": stand_in.url}).v1


@pytest.mark.parametrize(
    ("form", "decoded"),
    [
        ("", {}),
        ("a=1&b=x%20y&c=", {"a": "1", "b": "x y", "c": ""}),
        ("a[b][c]=1&a[d]=2", {"a": {"b": {"c": "1"}, "d": "2"}}),
        ("l[0][x]=1&l[1][x]=2", {"l": [{"x": "1"}, {"x": "2"}]}),
        ("expand[]=a&expand[]=b", {"expand": ["a", "b"]}),
        ("metadata[%C3%A9]=%E2%98%95", {"metadata": {"é": "☕"}}),
    ],
)
def test_forms_are_decoded(form: str, decoded: dict[str, Any]) -> None:
    assert parameters.decode(form) == decoded


_NAMES = st.text("abcdefgh_", min_size=1, max_size=6)
_TREES = st.recursive(
    st.text(min_size=1, max_size=8),
    lambda children: (
        st.lists(children, min_size=1, max_size=3)
        | st.dictionaries(_NAMES, children, min_size=1, max_size=3)
    ),
    max_leaves=12,
)


@given(params=st.dictionaries(_NAMES, _TREES, min_size=1, max_size=3))
def test_what_the_sdk_encodes_is_decoded_the_same(params: dict[str, Any]) -> None:
    assert parameters.decode(urlencode(list(_api_encode(params)))) == params


@pytest.mark.parametrize(
    ("form", "typed", "code"),
    [
        ("amount=1&bogus=1", stripe.params.RefundCreateParams, "parameter_unknown"),
        ("lines[0][bogus]=1", stripe.params.InvoiceAddLinesParams, "parameter_unknown"),
        ("lines[0][period][end]=1", stripe.params.InvoiceAddLinesParams, "parameter_missing"),
        ("", stripe.params.InvoiceAddLinesParams, "parameter_missing"),
        ("amount=1.5&currency=usd", stripe.params.PaymentIntentCreateParams, "parameter_invalid"),
        ("amount=1&currency=", stripe.params.PaymentIntentCreateParams, "parameter_invalid_empty"),
        ("mode=gift", checkout.SessionCreateParams, ""),
        ("expand=x", stripe.params.RefundCreateParams, ""),
        ("metadata=x", stripe.params.RefundCreateParams, ""),
        ("auto_advance=yes", stripe.params.InvoiceCreateParams, ""),
        ("auto_advance[x]=1", stripe.params.InvoiceCreateParams, ""),
        (f"metadata[{'k' * 41}]=x", stripe.params.RefundCreateParams, ""),
        (f"metadata[k]={'x' * 501}", stripe.params.RefundCreateParams, ""),
        ("api_key=x", stripe.params.RefundCreateParams, "parameter_unknown"),
    ],
)
def test_wrong_parameters_are_refused(form: str, typed: type, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        parameters.check(parameters.decode(form), typed)
    assert caught.value.status == 400
    assert caught.value.body["error"].get("code", "").startswith(code)


def test_parameters_come_out_in_pythons_types() -> None:
    form = "lines[0][quantity_decimal]=1.25&lines[0][amount]=-7&lines[0][discountable]=false"
    [line] = parameters.check(parameters.decode(form), stripe.params.InvoiceAddLinesParams)["lines"]
    assert line == {"quantity_decimal": Decimal("1.25"), "amount": -7, "discountable": False}


def test_every_endpoint_has_parameters_that_can_be_read() -> None:
    for each in routes.ROUTES:
        parameters.check({}, each.params) if each.method == "GET" else parameters._fields(
            each.params
        )
    assert len(routes.ROUTES) > 30


def test_a_decimal_with_an_exponent_is_refused(sdk: stripe.V1Services) -> None:
    """As the SDK sends small ones."""
    customer = sdk.customers.create({"name": "n"})
    draft = sdk.invoices.create({"customer": customer.id, "currency": "usd"})
    line: stripe.params.InvoiceAddLinesParamsLine = {"quantity_decimal": Decimal("0.00000075")}
    with pytest.raises(stripe.InvalidRequestError, match=r"Invalid decimal: 7\.5E-7"):
        sdk.invoices.add_lines(draft.id, {"lines": [line]})


def test_another_version_of_the_api_is_refused(stand_in: StandIn) -> None:
    client = stripe.StripeClient(
        stand_in.api_key, base_addresses={"api": stand_in.url}, stripe_version="2024-06-20"
    )
    with pytest.raises(stripe.InvalidRequestError, match="Invalid Stripe API version"):
        client.v1.customers.list()


def test_an_unknown_endpoint_or_expansion_is_refused(
    sdk: stripe.V1Services, stand_in: StandIn
) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="Unrecognized request URL"):
        sdk.coupons.create({"percent_off": 10})
    customer = sdk.customers.create({"name": "n"})
    with pytest.raises(stripe.InvalidRequestError, match="cannot be expanded"):
        sdk.customers.retrieve(customer.id, {"expand": ["nonsense"]})
    with pytest.raises(stripe.InvalidRequestError, match="unknown parameter"):
        sdk.customers.create({"nick_name": "n"})  # type: ignore[typeddict-unknown-key]
    assert [request.path for request in stand_in.unknown_params()] == ["/v1/customers"]


def test_pages_go_both_ways(sdk: stripe.V1Services) -> None:
    made = [sdk.customers.create({"name": str(number)}).id for number in range(7)]
    newest = made[::-1]
    ids = [each.id for each in sdk.customers.list({"limit": 3}).auto_paging_iter()]
    assert ids == newest
    page = sdk.customers.list({"limit": 2, "starting_after": newest[1]})
    assert ([each.id for each in page.data], page.has_more) == (newest[2:4], True)
    page = sdk.customers.list({"limit": 2, "ending_before": newest[3]})
    assert ([each.id for each in page.data], page.has_more) == (newest[1:3], True)
    found = sdk.customers.list({"limit": 2, "ending_before": newest[5]}).auto_paging_iter()
    assert [each.id for each in found] == newest[4::-1]
    with pytest.raises(stripe.InvalidRequestError):
        sdk.customers.list({"limit": 101})
    with pytest.raises(stripe.InvalidRequestError):
        sdk.customers.list({"starting_after": "cus_none"})


def new_customer(stand_in: StandIn, key: str = "k") -> str:
    client = Stripe(stand_in.api_key, stand_in.url)
    return client.create_customer(key, organization_id="o", name="n", email="a@b.test").id


def read(delivery: Delivery, stand_in: StandIn) -> str:
    assert delivery.headers is not None
    header = delivery.headers["Stripe-Signature"]
    now = datetime.fromtimestamp(stand_in.clock.now(), UTC)
    return parse_event(delivery.body, header, [stand_in.webhook_secret], now).id


def test_webhooks_can_be_taken_once(stand_in: StandIn) -> None:
    new_customer(stand_in)
    [delivery] = stand_in.webhooks.take()
    assert read(delivery, stand_in) == stand_in.events()[0]["id"]
    assert delivery.type == "customer.created"
    assert not stand_in.webhooks.take()


@pytest.mark.parametrize(
    "name", ["bad_signature", "altered_body", "old_timestamp", "future_timestamp"]
)
def test_webhooks_can_be_spoilt(stand_in: StandIn, name: str) -> None:
    setattr(stand_in.faults.webhooks, name, 1)
    new_customer(stand_in, "k1")
    new_customer(stand_in, "k2")
    spoilt, good = stand_in.webhooks.take()
    with pytest.raises(BadSignature):
        read(spoilt, stand_in)
    assert read(good, stand_in)


def test_webhooks_can_be_duplicated_dropped_delayed_and_reordered(stand_in: StandIn) -> None:
    spoilt = stand_in.faults.webhooks
    spoilt.drop = 1
    new_customer(stand_in, "k0")
    spoilt.delay = 1
    new_customer(stand_in, "k1")
    spoilt.duplicate = 1
    new_customer(stand_in, "k2")
    ids = [event["id"] for event in stand_in.events()]
    assert [each.event_id for each in stand_in.webhooks.take()] == [ids[2], ids[2]]
    stand_in.clock.advance(3600)
    assert [each.event_id for each in stand_in.webhooks.take()] == [ids[1]]
    spoilt.is_reordered = True
    for number in range(10):
        new_customer(stand_in, f"r{number}")
    ids = [event["id"] for event in stand_in.events()][3:]
    taken = [each.event_id for each in stand_in.webhooks.take()]
    assert sorted(taken) == sorted(ids)
    assert taken != ids


def test_webhooks_are_spoilt_at_random_by_the_seed() -> None:
    def run(seed: int) -> list[str]:
        with StandIn(seed) as stand_in:
            stand_in.faults.at_random({}, {"drop": 0.3, "duplicate": 0.3})
            for number in range(20):
                new_customer(stand_in, f"k{number}")
            positions = {event["id"]: n for n, event in enumerate(stand_in.events())}
            return [str(positions[each.event_id]) for each in stand_in.webhooks.take()]

    assert run(1) == run(1) != run(2)
    assert len(set(run(1))) < 20


def test_charges_may_come_into_the_balance_later(stand_in: StandIn) -> None:
    client = Stripe(stand_in.api_key, stand_in.url)
    customer_id = new_customer(stand_in)
    method = stand_in.save_card(customer_id)
    stand_in.book_late()
    payment = client.charge_saved_card(
        "c",
        customer_id=customer_id,
        payment_method_id=method["id"],
        amount_cents=1000,
        currency="usd",
        top_up_id="t",
    )
    assert (payment.is_paid, payment.balance_transaction_id) == (True, "")
    stand_in.book_charges()
    assert client.get_payment(payment.id).balance_transaction_id
    assert len(stand_in.events("charge.updated")) == 1


def test_a_payout_moves_the_balance(stand_in: StandIn) -> None:
    payout = stand_in.pay_out(500)
    client = Stripe(stand_in.api_key, stand_in.url)
    [move] = client.list_balance_transactions(datetime.now(UTC))
    assert (move.type, move.net_cents, move.source_id) == ("payout", -500, payout["id"])
    assert move.payment_id == ""


def test_while_a_secret_is_rolled_both_sign(stand_in: StandIn) -> None:
    stand_in.webhooks.secrets = ["whsec_new", stand_in.webhook_secret]
    new_customer(stand_in)
    [delivery] = stand_in.webhooks.take()
    assert read(delivery, stand_in)
    assert delivery.headers is not None
    header = delivery.headers["Stripe-Signature"]
    assert parse_event(delivery.body, header, ["whsec_new"], datetime.now(UTC))


class _Receiver(BaseHTTPRequestHandler):
    statuses: list[int]
    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.statuses.pop(0) if self.statuses else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_webhooks_are_posted_until_they_are_taken(stand_in: StandIn) -> None:
    _Receiver.statuses, _Receiver.bodies = [500, 404], []
    with HTTPServer(("127.0.0.1", 0), _Receiver) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        stand_in.webhooks.deliver_to(f"http://127.0.0.1:{server.server_port}/hook")
        new_customer(stand_in)
        assert stand_in.webhooks.settle()
        assert not stand_in.webhooks.delivered
        for wait_seconds in RETRY_SECONDS[:2]:
            stand_in.clock.advance(wait_seconds)
            assert stand_in.webhooks.settle()
        server.shutdown()
    assert len(set(_Receiver.bodies)) == 1
    assert [each.num_attempts for each in stand_in.webhooks.delivered] == [3]
    new_customer(stand_in, "after")
    for wait_seconds in (0, *RETRY_SECONDS):
        stand_in.clock.advance(wait_seconds)
        assert stand_in.webhooks.settle()
    assert [each.status for each in stand_in.webhooks.given_up] == [0]


def test_it_is_controlled_over_http(stand_in: StandIn) -> None:
    def control(act: str, **arguments: Any) -> Any:
        answer = httpx.post(f"{stand_in.url}/_control/{act}", content=json.dumps(arguments))
        assert answer.status_code == 200, answer.text
        return answer.json()

    customer_id = new_customer(stand_in)
    method = control("save_card", customer_id=customer_id, card="4000000000000341")
    assert method["card"]["last4"] == "0341"
    before = stand_in.clock.now()
    assert control("clock/advance", seconds=3600) >= before + 3600
    control("faults/add", kind="busy", path="/v1/customers", seconds=9)
    control("faults/webhooks", duplicate=2)
    assert stand_in.faults.webhooks.duplicate == 2
    assert control("requests")[0]["path"] == "/v1/customers"
    assert "customer.created" in [event["type"] for event in control("events")]
    with pytest.raises(stripe.RateLimitError):
        stripe.StripeClient(
            stand_in.api_key, base_addresses={"api": stand_in.url}
        ).v1.customers.create({"name": "n"})
    answer = httpx.post(f"{stand_in.url}/_control/nonsense")
    assert answer.status_code == 404
    answer = httpx.post(f"{stand_in.url}/_control/save_card", content='{"card": "4242"}')
    assert answer.status_code == 400


def test_its_pages_pay_save_cards_and_lead_back(stand_in: StandIn) -> None:
    client = Stripe(stand_in.api_key, stand_in.url)
    customer_id = new_customer(stand_in)
    checkout_session = client.create_checkout(
        "c",
        customer_id=customer_id,
        amount_cents=1234,
        currency="usd",
        top_up_id="t",
        success_url="https://box.test/done?session={CHECKOUT_SESSION_ID}",
        cancel_url="https://box.test/back",
    )
    page = httpx.get(checkout_session.url)
    assert "12.34 USD" in page.text
    assert "https://box.test/back" in page.text
    page = httpx.post(checkout_session.url, data={"card": "4000000000000002"})
    assert "declined" in page.text
    done = httpx.post(checkout_session.url, data={"card": "4000002500003155"})
    assert done.headers["location"] == f"https://box.test/done?session={checkout_session.id}"
    assert client.get_checkout(checkout_session.id).payment_status == "paid"
    portal = client.create_portal(customer_id=customer_id, return_url="https://box.test/billing")
    assert "visa 4242" in httpx.post(portal, data={"card": "4242424242424242"}).text
    default = client.get_customer(customer_id).default_payment_method
    assert default
    assert default not in httpx.post(portal, data={"remove": default}).text
    assert client.get_customer(customer_id).default_payment_method == ""


def test_the_same_seed_makes_the_same_ids() -> None:
    def run(seed: int) -> str:
        with StandIn(seed) as stand_in:
            return new_customer(stand_in)

    assert run(7) == run(7) != run(8)
