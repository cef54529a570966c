"""Webhooks of Stripe: that Stripe sent them, just now, and which object they speak of.

Checks by itself rather than with the SDK, which takes times from the future.
"""

import hashlib
import hmac
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from app.billing.stripe_errors import BadSignature
from app.billing.stripe_objects import Event, read_event

MAX_AGE_SECONDS = 300
_SCHEME = "v1"


def parse_event(body: bytes, header: str, secrets: Sequence[str], now: datetime) -> Event:
    """The event of a webhook. `header` is Stripe-Signature; any one of `secrets` may have signed
    it, so that a secret can be rolled. Raises BadSignature."""
    sent_at, signatures = _parts(header)
    keys = [secret.strip() for secret in secrets if secret.strip()]
    if not keys:
        raise BadSignature(
            "No webhook secret is set: set TAPEOUT_STRIPE_WEBHOOK_SECRET to the signing secret"
            " (whsec_...) that Stripe shows for this endpoint"
        )
    signed = b"%d." % sent_at + body
    if not any(_is_signed(signed, key, signatures) for key in keys):
        raise BadSignature(
            "The signature is of another secret, or the body was altered on its way: compare"
            " TAPEOUT_STRIPE_WEBHOOK_SECRET with the endpoint's signing secret at Stripe"
        )
    age_seconds = int(now.timestamp()) - sent_at
    if abs(age_seconds) > MAX_AGE_SECONDS:
        raise BadSignature(
            f"The webhook was signed {abs(age_seconds)} s {'ago' if age_seconds > 0 else 'ahead'},"
            f" more than {MAX_AGE_SECONDS} s: set this machine's clock (is time synchronised?)"
        )
    return _event(body)


def _parts(header: str) -> tuple[int, list[str]]:
    """The time and the signatures of `t=1700000000,v1=abc,v1=def,v0=ghi`."""
    pairs = [pair.strip().partition("=") for pair in header.split(",")]
    times = [value for name, _, value in pairs if name == "t"]
    signatures = [value for name, _, value in pairs if name == _SCHEME]
    is_time = len(times) == 1 and len(times[0]) <= 12 and times[0].isdecimal()
    if not is_time or not times[0].isascii() or not signatures:
        raise BadSignature(
            "No Stripe-Signature header of the form t=...,v1=...: only Stripe may call this, with"
            " its body and headers passed on unchanged"
        )
    return int(times[0]), signatures


def _is_signed(signed: bytes, key: str, signatures: list[str]) -> bool:
    expected = hmac.new(key.encode(), signed, hashlib.sha256).hexdigest().encode()
    return any(hmac.compare_digest(expected, signature.encode()) for signature in signatures)


def _event(body: bytes) -> Event:
    try:
        data: Any = json.loads(body)
        if data["object"] != "event":
            raise BadSignature(
                f"This is a {data['object']}, not an event: set the endpoint at Stripe to send"
                " snapshot events"
            )
        return read_event(data)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadSignature("The body is signed but is no event of Stripe's in JSON") from error
