"""What each fault of Stripe or the network comes out as, and that it takes effect at most once."""

import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from app.billing.stripe import Stripe
from app.billing.stripe_errors import (
    StripeBusy,
    StripeError,
    StripeKeyReused,
    StripeRejected,
    StripeUnauthorized,
    StripeUnknown,
    StripeUnreachable,
)
from app.billing.stripe_objects import Customer
from tests.stripe_stand_in.faults import Kind
from tests.stripe_stand_in.server import StandIn

CUSTOMERS = "/v1/customers"
NewClient = Callable[..., Stripe]


@pytest.fixture
def new_client(stripe_stand_in: StandIn) -> NewClient:
    """A client with the number of retries that a test wants."""

    def make(max_retries: int, timeout_seconds: int = 10) -> Stripe:
        stand_in = stripe_stand_in
        return Stripe(
            stand_in.api_key,
            stand_in.url,
            max_retries=max_retries,
            timeout_seconds=timeout_seconds,
        )

    return make


def create(stripe: Stripe, key: str = "k", name: str = "Acme") -> Customer:
    return stripe.create_customer(key, organization_id="org_1", name=name, email="")


def num_customers(stand_in: StandIn) -> int:
    return len(stand_in.account.all("customer"))


@pytest.mark.parametrize(
    ("kind", "error", "is_done"),
    [
        ("lose_request", StripeUnknown, False),
        ("lose_reply", StripeUnknown, True),
        ("fail_before", StripeUnknown, False),
        ("fail_saved", StripeUnknown, False),
        ("fail_after", StripeUnknown, True),
        ("bad_gateway", StripeUnknown, True),
        ("busy", StripeBusy, False),
        ("locked", StripeBusy, False),
        ("reject", StripeRejected, False),
    ],
)
def test_a_fault_says_whether_it_may_have_happened(
    new_client: NewClient,
    stripe_stand_in: StandIn,
    kind: Kind,
    error: type[StripeError],
    is_done: bool,
) -> None:
    fault = stripe_stand_in.faults.add(kind, CUSTOMERS)
    with pytest.raises(StripeError) as caught:
        create(new_client(max_retries=0))
    assert type(caught.value) is error
    assert fault.num_hit == 1
    assert num_customers(stripe_stand_in) == is_done
    assert "support@stripe.com" not in str(caught.value)
    assert len(str(caught.value)) <= 300
    # Looking afterwards settles it: lists show what was done before.
    found = new_client(max_retries=0).find_customer("org_1")
    assert (found is not None) is is_done


@pytest.mark.parametrize("kind", ["lose_request", "lose_reply", "fail_before", "bad_gateway"])
def test_what_has_a_key_is_repeated_by_its_caller_alone(
    new_client: NewClient, stripe_stand_in: StandIn, kind: Kind
) -> None:
    """The SDK's own repetition knows no time: after a day Stripe would do it again."""
    stripe_stand_in.faults.add(kind, CUSTOMERS, times=2)
    client = new_client(max_retries=2)
    for attempt in range(2):
        with pytest.raises(StripeUnknown):
            create(client, key="customer:org_1")
        assert len(stripe_stand_in.requests_to(CUSTOMERS)) == attempt + 1
    made = create(client, key="customer:org_1")
    assert [made.id] == [each["id"] for each in stripe_stand_in.account.all("customer")]
    keys = [request.key for request in stripe_stand_in.requests_to(CUSTOMERS)]
    assert keys == ["customer:org_1"] * 3


@pytest.mark.parametrize("kind", ["busy", "reject", "locked"])
def test_a_clear_no_is_not_tried_again(
    new_client: NewClient, stripe_stand_in: StandIn, kind: Kind
) -> None:
    stripe_stand_in.faults.add(kind, CUSTOMERS)
    with pytest.raises((StripeBusy, StripeRejected)):
        create(new_client(max_retries=2))
    assert len(stripe_stand_in.requests_to(CUSTOMERS)) == 1


@pytest.mark.parametrize("first", ["lose_reply", "fail_before", "bad_gateway", "in_use"])
def test_a_doubt_is_about_its_own_call_alone(
    new_client: NewClient, stripe_stand_in: StandIn, first: Kind
) -> None:
    stripe_stand_in.faults.add(first, CUSTOMERS)
    client = new_client(max_retries=2)
    with pytest.raises(StripeUnknown):
        create(client)
    stripe_stand_in.faults.add("busy", CUSTOMERS)
    with pytest.raises(StripeBusy):
        create(client, key="other")


def test_busy_says_when_to_come_back(new_client: NewClient, stripe_stand_in: StandIn) -> None:
    stripe_stand_in.faults.add("busy", CUSTOMERS, seconds=17)
    with pytest.raises(StripeBusy) as caught:
        create(new_client(max_retries=0))
    assert caught.value.retry_after_seconds == 17


@pytest.mark.parametrize(("kind", "is_done"), [("fail_saved", False), ("fail_after", True)])
def test_a_saved_fault_stays_unknown_for_as_long_as_the_key_is_kept(
    new_client: NewClient, stripe_stand_in: StandIn, kind: Kind, is_done: bool
) -> None:
    client = new_client(max_retries=2)
    stripe_stand_in.faults.add(kind, CUSTOMERS)
    with pytest.raises(StripeUnknown) as caught:
        create(client)
    assert not caught.value.is_saved
    for _ in range(2):
        with pytest.raises(StripeUnknown) as caught:
            create(client)
        assert caught.value.is_saved
    assert [each.is_replay for each in stripe_stand_in.requests] == [False, True, True]
    assert num_customers(stripe_stand_in) == is_done
    # After a day Stripe forgets the key, and would do it again: hence looking comes first.
    stripe_stand_in.clock.advance(86400)
    create(client)
    assert num_customers(stripe_stand_in) == is_done + 1


def test_a_key_stands_for_its_parameters(new_client: NewClient, stripe_stand_in: StandIn) -> None:
    client = new_client(max_retries=2)
    create(client)
    with pytest.raises(StripeKeyReused, match="same parameters"):
        create(client, name="Other")
    with pytest.raises(StripeKeyReused):
        client.refund("k", payment_id="pi_1", amount_cents=1, top_up_id="t")
    assert num_customers(stripe_stand_in) == 1


def test_a_refusal_of_the_parameters_is_not_saved(
    new_client: NewClient, stripe_stand_in: StandIn
) -> None:
    client = new_client(max_retries=0)
    customer = create(client)

    def charge(cents: int) -> None:
        client.charge_saved_card(
            "charge",
            customer_id=customer.id,
            payment_method_id=stripe_stand_in.account.all("payment_method")[0]["id"],
            amount_cents=cents,
            currency="usd",
            top_up_id="t",
        )

    stripe_stand_in.save_card(customer.id)
    with pytest.raises(StripeRejected) as caught:
        charge(49)
    assert (caught.value.code, caught.value.param) == ("amount_too_small", "amount")
    charge(50)  # with the same key


def test_two_at_once_with_one_key_do_it_once(
    new_client: NewClient, stripe_stand_in: StandIn
) -> None:
    stripe_stand_in.faults.add("slow", CUSTOMERS, seconds=1)
    slow = threading.Thread(target=create, args=(new_client(max_retries=0),))
    slow.start()
    while not stripe_stand_in.keys.is_at_work("k"):
        time.sleep(0.01)
    with pytest.raises(StripeUnknown, match="in-progress"):
        create(new_client(max_retries=0))
    slow.join()
    assert create(new_client(max_retries=0))
    assert num_customers(stripe_stand_in) == 1


def test_what_is_too_slow_may_still_happen(new_client: NewClient, stripe_stand_in: StandIn) -> None:
    stripe_stand_in.faults.add("slow", CUSTOMERS, seconds=2)
    with pytest.raises(StripeUnknown, match="ReadTimeout"):
        create(new_client(max_retries=0, timeout_seconds=1))
    client = new_client(max_retries=0)
    while client.find_customer("org_1") is None:
        time.sleep(0.05)
    assert num_customers(stripe_stand_in) == 1


def test_nothing_happens_where_there_is_no_connection(
    new_client: NewClient, stripe_stand_in: StandIn
) -> None:
    client = new_client(max_retries=2)
    create(client, key="before")
    stripe_stand_in.go_away()
    with pytest.raises(StripeUnreachable, match="network") as caught:
        create(new_client(max_retries=2))
    assert caught.value.retry_after_seconds > 0
    # A client that had a connection open finds it broken, then refused.
    with pytest.raises((StripeUnreachable, StripeUnknown)):
        create(client)
    stripe_stand_in.start()
    create(client)
    assert num_customers(stripe_stand_in) == 2


def test_an_answer_lost_before_stripe_went_away_stays_in_doubt(
    new_client: NewClient, stripe_stand_in: StandIn
) -> None:
    stripe_stand_in.faults.add("crash", CUSTOMERS)
    with pytest.raises(StripeUnknown):
        create(new_client(max_retries=2))
    assert num_customers(stripe_stand_in) == 1
    stripe_stand_in.start()
    create(new_client(max_retries=2))
    assert num_customers(stripe_stand_in) == 1


def test_what_is_not_known_to_be_stripe_is_sent_nothing(tmp_path: Path) -> None:
    """A network that answers in Stripe's place: the request never left."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    now = datetime.now(UTC)
    certificate = (
        builder.not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "pem"
    unlocked = serialization.NoEncryption()
    pem.write_bytes(
        key.private_bytes(Encoding.PEM, serialization.PrivateFormat.PKCS8, unlocked)
        + certificate.public_bytes(Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection, suppress(ssl.SSLError):
                context.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(StripeUnreachable, match="SSLError"):
            create(Stripe("sk_test", f"https://localhost:{server.getsockname()[1]}", max_retries=0))
        thread.join()


def test_threads_share_a_client(new_client: NewClient, stripe_stand_in: StandIn) -> None:
    client = new_client(max_retries=2)
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: create(client, key=f"k{n % 10}"), range(40)))
    assert len({customer.id for customer in made}) == 10 == num_customers(stripe_stand_in)


def test_a_wrong_key_of_the_account_can_be_put_right(stripe_stand_in: StandIn) -> None:
    with pytest.raises(StripeUnauthorized) as caught:
        create(Stripe("sk_test_wrong", stripe_stand_in.url))
    assert isinstance(caught.value, StripeBusy)  # it did not happen; later it will
    create(Stripe(stripe_stand_in.api_key, stripe_stand_in.url))


@pytest.mark.parametrize("kind", ["lose_reply", "fail_before", "lose_request"])
def test_reading_is_repeated_too(
    new_client: NewClient, stripe_stand_in: StandIn, kind: Kind
) -> None:
    client = new_client(max_retries=2)
    made = create(client)
    stripe_stand_in.faults.add(kind, CUSTOMERS, method="GET", times=2)
    assert client.get_customer(made.id) == made
    stripe_stand_in.faults.add(kind, "/v1/events", method="GET", times=3)
    with pytest.raises(StripeUnknown):
        list(client.list_events(datetime.now(UTC)))


def test_a_deleted_draft_whose_answer_was_lost_is_gone(
    new_client: NewClient, stripe_stand_in: StandIn
) -> None:
    client = new_client(max_retries=2)
    customer = create(client)
    draft = client.create_invoice(
        "i",
        customer_id=customer.id,
        currency="usd",
        invoice_id="inv_1",
        description="November",
        is_automatic=True,
    )
    stripe_stand_in.faults.add("lose_reply", draft.id, method="DELETE")
    client.delete_draft(draft.id)
    assert not stripe_stand_in.account.all("invoice")


def test_faults_at_random_repeat_with_their_seed() -> None:
    def run(seed: int) -> list[tuple[str, int]]:
        with StandIn(seed) as stand_in:
            stand_in.faults.at_random({"lose_reply": 0.2, "fail_before": 0.2, "busy": 0.1})
            client = Stripe(stand_in.api_key, stand_in.url, max_retries=0)
            for number in range(30):
                try:
                    create(client, key=f"k{number}")
                except StripeError:
                    continue
            return [(each.fault, each.status) for each in stand_in.requests]

    assert run(1) == run(1) != run(2)
