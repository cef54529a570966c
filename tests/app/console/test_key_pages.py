"""The pages of keys: limits and expiry, beside what `test_pages.py` has of making and revoking."""

import re

import pytest
from sqlalchemy import select

from app.billing.tables import Budget
from app.core import clock
from app.organizations.tables import ApiKey
from tests.app.console.conftest import Console

HERE = "/console/keys"


async def made(owned: Console, **fields: str) -> str:
    """The new key's id."""
    done = await owned.post(HERE, HERE, name="ci", scope="inference", **fields)
    assert done.status == 200, done.text
    async with owned.database.read() as session:
        found = await session.scalar(select(ApiKey.id).where(ApiKey.name == "ci"))
    assert found is not None
    return found


async def test_a_key_is_made_with_a_limit_and_a_last_day(owned: Console) -> None:
    id = await made(owned, expiry="day", expires_on="2099-03-01", limit="12.50", period="day")
    async with owned.database.read() as session:
        key = await session.get_one(ApiKey, id)
        budget = await session.scalar(select(Budget))
    assert key.expires_at is not None
    assert f"{key.expires_at:%Y-%m-%d %H:%M}" == "2099-03-01 00:00"
    assert budget is not None
    assert (budget.scope, budget.subject, budget.period) == ("key", id, "day")
    assert budget.limit_nano == 12_500_000_000
    page = (await owned.client.get(HERE)).text
    assert "$12.50 a day" in page
    assert f'href="{HERE}/{id}"' in page


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"limit": "much"}, "A limit is an amount such as 12.50"),
        ({"limit": "5", "period": "year"}, "period is one of day, month"),
        ({"expiry": "day"}, "Give the day on which the key expires"),
        ({"expiry": "day", "expires_on": "2020-01-01"}, "lies in the past"),
        ({"expiry": "soon"}, "Choose when the key expires"),
    ],
)
async def test_a_wrong_form_makes_nothing(
    owned: Console, fields: dict[str, str], said: str
) -> None:
    done = await owned.post(HERE, HERE, name="ci", scope="read", **fields)
    assert done.status == 400
    assert said in done.text
    assert 'value="ci"' in done.text
    async with owned.database.read() as session:
        assert await session.scalar(select(ApiKey.id).where(ApiKey.name == "ci")) is None


async def test_a_limit_is_changed_and_taken_away(owned: Console) -> None:
    id = await made(owned)
    page = f"{HERE}/{id}"
    assert "As much as the organization may." in (await owned.client.get(page)).text
    for limit in ("5", "7"):
        done = await owned.post(page, f"{page}/limit", limit=limit, period="month")
        assert done.location == f"{page}?notice=budget"
    text = (await owned.client.get(page)).text
    assert "$7.00" in text
    assert "$5.00</td>" not in text
    refused = await owned.post(page, f"{page}/limit", limit="-1", period="month")
    assert refused.status == 400
    done = await owned.post(page, f"{page}/limit", limit="", period="month")
    assert done.location == f"{page}?notice=budget-gone"
    assert "As much as the organization may." in (await owned.client.get(page)).text


async def test_the_page_says_when_a_key_ended(owned: Console) -> None:
    id = await made(owned, expiry="1")
    text = (await owned.client.get(f"{HERE}/{id}")).text
    assert re.search(r"works until 20\d\d-", text)
    async with owned.database.write() as session:
        (await session.get_one(ApiKey, id)).expires_at = clock.now()
    assert "calls with it answer 401 and say so" in (await owned.client.get(f"{HERE}/{id}")).text
    assert (await owned.client.get(f"{HERE}/key_none")).status_code == 404
