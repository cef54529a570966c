"""Payments of one organization against the stand-in for Stripe, on both of which time can pass."""

from collections.abc import AsyncIterator
from datetime import timedelta

import msgspec
import pytest

from app.core import clock
from app.core.database import Database
from app.organizations.service import bootstrap, create_organization
from app.settings import Settings
from tests.app.billing.payments.cashier import Cashier
from tests.stripe_stand_in.fixtures import stripe_stand_in
from tests.stripe_stand_in.server import StandIn

__all__ = ["stripe_stand_in"]


class Time:
    """Ours and Stripe's."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self.passed = timedelta()

    def passes(self, *, hours: int = 0, minutes: int = 0, seconds: int = 0) -> None:
        more = timedelta(hours=hours, minutes=minutes, seconds=seconds)
        self.passed += more
        self._stand_in.clock.advance(int(more.total_seconds()))


@pytest.fixture
def time(stripe_stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> Time:
    time, real = Time(stripe_stand_in), clock.now
    monkeypatch.setattr(clock, "now", lambda: real() + time.passed)
    return time


@pytest.fixture
def stripe_settings(settings: Settings, stripe_stand_in: StandIn) -> Settings:
    return msgspec.structs.replace(
        settings,
        stripe_api_key=stripe_stand_in.api_key,
        stripe_api_base=stripe_stand_in.url,
        stripe_webhook_secrets=(stripe_stand_in.webhook_secret,),
    )


@pytest.fixture
async def cashier(
    database: Database, stripe_settings: Settings, stripe_stand_in: StandIn, time: Time
) -> AsyncIterator[Cashier]:
    await bootstrap(database, stripe_settings)
    async with database.write() as session:
        organization = await create_organization(session, "acme")
    cashier = Cashier(database, stripe_settings, stripe_stand_in, time, organization.id)
    yield cashier
    await cashier.payments.close()
