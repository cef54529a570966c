"""Fixtures: a stand-in for the test, and our client of it."""

from collections.abc import Iterator

import pytest
from stripe import HTTPClient

from app.billing.stripe import Stripe
from tests.stripe_stand_in.server import StandIn


@pytest.fixture
def stripe_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in of this test's own, which must not see a parameter that Stripe does not know."""
    monkeypatch.setattr(HTTPClient, "INITIAL_DELAY", 0)  # between the SDK's retries
    with StandIn() as stand_in:
        yield stand_in
        assert not stand_in.crashes, stand_in.crashes[0]
        refused = stand_in.unknown_params()
    assert not refused, f"parameters that Stripe does not take: {refused}"


@pytest.fixture
def stripe_client(stripe_stand_in: StandIn) -> Stripe:
    return Stripe(stripe_stand_in.api_key, stripe_stand_in.url, timeout_seconds=10)
