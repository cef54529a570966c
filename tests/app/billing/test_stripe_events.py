"""Webhooks are believed only when Stripe signed these bytes with our secret just now."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stripe import WebhookSignature

from app.billing.stripe_errors import BadSignature
from app.billing.stripe_events import MAX_AGE_SECONDS, parse_event
from app.billing.stripe_objects import Event

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
SECRET = "whsec_first"
OTHER = "whsec_second"
EVENT = {
    "id": "evt_1",
    "object": "event",
    "type": "payment_intent.succeeded",
    "created": int(NOW.timestamp()),
    "data": {"object": {"id": "pi_1", "object": "payment_intent", "note": "Zürich ☕"}},
}
BODY = json.dumps(EVENT, indent=2, ensure_ascii=False).encode()


def signed(body: bytes = BODY, secret: str = SECRET, age_seconds: int = 0) -> str:
    """The header as the SDK makes it."""
    sent_at = int(NOW.timestamp()) - age_seconds
    return WebhookSignature.generate_signature_header(body.decode(), secret, sent_at)


def test_a_good_event_is_read() -> None:
    event = parse_event(BODY, signed(), [SECRET], NOW)
    assert event == Event("evt_1", "payment_intent.succeeded", NOW, "pi_1", "payment_intent")


def test_either_secret_will_do_while_one_is_rolled() -> None:
    for secret in (SECRET, OTHER):
        assert parse_event(BODY, signed(secret=secret), [SECRET, OTHER], NOW).id == "evt_1"
    both = signed() + "," + signed(secret=OTHER).split(",")[1]
    for secret in (SECRET, OTHER):
        assert parse_event(BODY, both, [secret], NOW).id == "evt_1"
    assert parse_event(BODY, signed(), ["", f" {SECRET}\n"], NOW).id == "evt_1"


@pytest.mark.parametrize("age_seconds", [MAX_AGE_SECONDS, 0, -MAX_AGE_SECONDS])
def test_clocks_may_differ_a_little(age_seconds: int) -> None:
    assert parse_event(BODY, signed(age_seconds=age_seconds), [SECRET], NOW).id == "evt_1"


@pytest.mark.parametrize(
    ("age_seconds", "words"),
    [(MAX_AGE_SECONDS + 1, "301 s ago"), (-MAX_AGE_SECONDS - 1, "301 s ahead")],
)
def test_old_and_future_ones_are_refused(age_seconds: int, words: str) -> None:
    with pytest.raises(BadSignature, match=words):
        parse_event(BODY, signed(age_seconds=age_seconds), [SECRET], NOW)
    with pytest.raises(BadSignature):
        parse_event(BODY, signed(), [SECRET], NOW + timedelta(days=365))


@pytest.mark.parametrize("secrets", [[], [""], [" "]])
def test_without_a_secret_nothing_is_believed(secrets: list[str]) -> None:
    # What is signed with an empty secret proves nothing.
    for header in (signed(), *(signed(secret=secret) for secret in ("", *secrets))):
        with pytest.raises(BadSignature, match="set TAPEOUT_STRIPE_WEBHOOK_SECRET"):
            parse_event(BODY, header, secrets, NOW)
    with pytest.raises(BadSignature):
        parse_event(BODY, signed(secret=""), [SECRET, *secrets], NOW)


def _replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda header: header.replace(old, new)


@pytest.mark.parametrize(
    "alter",
    [
        lambda header: "",
        lambda header: "nonsense",
        lambda header: header.split(",")[0],
        lambda header: header.split(",")[1],
        lambda header: header + ",t=1",
        lambda header: header[:-1],
        lambda header: header[:-1] + ("0" if header[-1] != "0" else "1"),
        lambda header: header + "0",
        _replaced("v1=", "v0="),
        _replaced("t=", "t=1"),
        _replaced("t=", "t=-"),
        _replaced("t=", "t=1,t="),
        _replaced("t=", "t=٣"),
        _replaced("t=", "t=" + "9" * 40),
        _replaced("t=", "x="),
        lambda header: "t=,v1=",
        lambda header: header.split("v1=")[0] + "v1=é",
    ],
)
def test_an_altered_header_is_refused(alter: Callable[[str], str]) -> None:
    with pytest.raises(BadSignature) as caught:
        parse_event(BODY, alter(signed()), [SECRET], NOW)
    assert len(str(caught.value)) > 40  # it says what to do


@pytest.mark.parametrize(
    "body", [BODY.replace(b"pi_1", b"pi_2"), BODY + b" ", BODY[:-1], b"", b"\xff" + BODY]
)
def test_altered_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(BadSignature, match="altered"):
        parse_event(body, signed(), [SECRET], NOW)
    with pytest.raises(BadSignature):
        parse_event(BODY, signed(secret="whsec_of_another_endpoint"), [SECRET], NOW)


def _without(*path: str) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(BODY)
    node = copy
    for name in path[:-1]:
        node = node[name]
    del node[path[-1]]
    return copy


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "null",
        '"event"',
        "{}",
        json.dumps(_without("id")),
        json.dumps(_without("created")),
        json.dumps(_without("data", "object")),
        json.dumps({**EVENT, "created": "today"}),
        json.dumps({**EVENT, "data": []}),
        json.dumps({**EVENT, "object": "v2.core.event"}),
    ],
)
def test_signed_bodies_that_are_no_events_are_refused(content: str) -> None:
    body = content.encode()
    with pytest.raises(BadSignature):
        parse_event(body, signed(body), [SECRET], NOW)


@given(header=st.text(max_size=80), body=st.binary(max_size=80))
def test_no_input_raises_anything_else(header: str, body: bytes) -> None:
    for text in (header, f"t={int(NOW.timestamp())},v1={header}"):
        with pytest.raises(BadSignature):
            parse_event(body, text, [SECRET], NOW)
