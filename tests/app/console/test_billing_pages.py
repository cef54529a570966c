"""The page Billing and its forms, over the whole application and a stand-in for Stripe."""

import html
import re
from collections.abc import AsyncIterator
from datetime import timedelta

import httpx
import msgspec
import pytest
from litestar import Litestar

from app.billing.credits import add_lot
from app.billing.ledger import PROMOTIONAL_COST, lock_account
from app.billing.payments.notices import notify
from app.billing.payments.tables import Invoice, Notice
from app.core import clock
from app.core.database import Database
from app.settings import Settings
from tests.app.whole_app import URL, Tenant, add_tenant, client, running
from tests.stripe_stand_in.server import StandIn

HERE = "/console/billing"


class Desk:
    """Somebody signed in, before the page."""

    def __init__(self, application: Litestar, http: httpx.AsyncClient, tenant: Tenant) -> None:
        self.database: Database = application.state.database
        self.application = application
        self.http = http
        self.tenant = tenant

    async def page(self, path: str = HERE) -> str:
        answer = await self.http.get(path)
        assert answer.status_code == 200, answer.text
        return html.unescape(" ".join(answer.text.split()))

    async def post(self, path: str, **fields: str) -> httpx.Response:
        data = {"csrf_token": self.tenant.csrf_token} | fields
        return await self.http.post(path, data=data, headers={"Origin": URL})

    async def done(self, path: str, **fields: str) -> str:
        """A form that is taken; where it leads."""
        answer = await self.post(path, **fields)
        assert answer.status_code == 303, answer.text
        return answer.headers["location"]

    async def refused(self, path: str, **fields: str) -> str:
        answer = await self.post(path, **fields)
        assert 400 <= answer.status_code < 500, answer.text
        return html.unescape(" ".join(answer.text.split()))


async def desk_of(settings: Settings, *, is_operator: bool) -> AsyncIterator[Desk]:
    async with running(settings, has_clerk=False) as application, client(application) as http:
        tenant = await add_tenant(application, "acme", is_operator=is_operator)
        http.cookies.update(tenant.cookies)
        yield Desk(application, http, tenant)


@pytest.fixture
async def desk(settings: Settings) -> AsyncIterator[Desk]:
    """Of a customer, on a box without Stripe."""
    async for made in desk_of(settings, is_operator=False):
        yield made


@pytest.fixture
async def paying(settings: Settings, stripe_stand_in: StandIn) -> AsyncIterator[Desk]:
    """Of a customer, on a box with Stripe."""
    with_stripe = msgspec.structs.replace(
        settings,
        stripe_api_key=stripe_stand_in.api_key,
        stripe_api_base=stripe_stand_in.url,
        stripe_webhook_secrets=(stripe_stand_in.webhook_secret,),
        public_url=URL,
    )
    async for made in desk_of(with_stripe, is_operator=False):
        yield made


async def test_without_stripe_it_teaches_and_the_rest_works(desk: Desk) -> None:
    page = await desk.page()
    for said in (
        "TAPEOUT_STRIPE_API_KEY",
        "There is no budget",
        "There is no invoice yet",
        "Nothing was paid ahead yet",
    ):
        assert said in page, said
    assert "Spending limit" not in page  # that is the operator's to set
    refused = await desk.refused(f"{HERE}/top-ups", top_up="25.00")
    assert "must set TAPEOUT_STRIPE_API_KEY" in refused
    assert await desk.done(f"{HERE}/budgets", of="organization", period="month", limit="5")


async def test_invoices_are_paged_from_the_newest(desk: Desk) -> None:
    stranger = await add_tenant(desk.application, "stranger")
    async with desk.database.write() as session:
        for number in range(1, 28):
            session.add(invoice(number, desk.tenant))
        session.add(invoice(28, stranger))
    seen: list[list[str]] = []
    path = HERE
    while path and len(seen) < 9:
        page = (await desk.page(path)).split('id="invoices"')[1].split("</section>")[0]
        seen.append(re.findall(r"invoices/inv_(\d+)", page))
        assert ("Newest invoices" in page) == (len(seen) > 1)
        older = re.search(r'href="([^"#]+)#invoices" rel="next"', page)
        path = older[1] if older else ""
    assert [len(shown) for shown in seen] == [12, 12, 3]
    assert [int(number) for shown in seen for number in shown] == list(range(27, 0, -1))
    assert "There is no older one" in await desk.page(f"{HERE}?after=1")
    assert (await desk.http.get(f"{HERE}?after=yesterday")).status_code == 400
    told: list[int] = []
    after: str | None = ""
    async with client(desk.application) as http:
        while after is not None:
            asked = {"after": after, "limit": 10}
            answer = await http.get("/api/invoices", params=asked, headers=desk.tenant.bearer)
            assert answer.status_code == 200, answer.text
            told += [each["number"] for each in answer.json()["invoices"]]
            after = answer.json()["next"]
    assert told == list(range(27, 0, -1))


def invoice(number: int, tenant: Tenant) -> Invoice:
    """Of a month of its own, one after the other."""
    return Invoice(
        id=f"inv_{number}",
        number=number,
        organization_id=tenant.id,
        organization_name=tenant.name,
        period=f"{2023 + number // 12}-{number % 12 + 1:02d}",
        state="paid",
        currency="usd",
        usage_nano=0,
        credit_nano=0,
        carry_in_nano=0,
        due_cents=0,
        carry_out_nano=0,
        created_at=clock.now(),
    )


async def test_credit_is_told_apart_from_what_is_owed(desk: Desk) -> None:
    async with desk.database.write() as session:
        account = await lock_account(session, desk.tenant.id, "usd")
        account.credit_limit_nano = 0
        await add_lot(
            session,
            desk.tenant.id,
            "promotional",
            7_500_000_000,
            source="grant:1",
            currency="usd",
            from_account=PROMOTIONAL_COST,
            expires_at=clock.now() + timedelta(days=9),
            note="Welcome",
        )
    page = await desk.page()
    ending = clock.now() + timedelta(days=9)
    assert "Prepaid: requests run while there is credit" in page
    assert "<dt>Balance</dt><dd>$7.50<small>$7.50 for new requests" in page
    assert f"$7.50 ends on {ending.day} {ending:%b %Y}" in page
    assert "Welcome" in page


async def test_budgets_are_set_changed_and_removed(desk: Desk) -> None:
    of_key = f"key:{desk.tenant.key_id}"
    assert await desk.done(f"{HERE}/budgets", of="organization", period="day", limit="1.50")
    assert await desk.done(f"{HERE}/budgets", of=of_key, period="month", limit="20")
    assert await desk.done(f"{HERE}/budgets", of=of_key, period="month", limit="$30.00")
    table = (await desk.page()).split('id="budgets"')[1].split("</table>")[0]
    assert table.count("<tr") == 3
    assert "$1.50" in table
    assert "$30.00" in table
    assert "key of acme" in table
    assert "$20.00" not in table
    budget_id = re.findall(r"budgets/(\w+)/delete", table)[0]
    await desk.done(f"{HERE}/budgets/{budget_id}/delete")
    assert budget_id not in await desk.page()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"of": "organization", "limit": "much"}, "A budget is an amount such as 12.50"),
        ({"of": "organization", "limit": ""}, "A budget is an amount"),
        ({"of": "organization", "limit": "9" * 15}, "A budget is 0 to a billion"),
        ({"of": "key:key_of_somebody", "limit": "1"}, "You have no key"),
        ({"of": "model:nothing", "limit": "1"}, "You have no model"),
        ({"of": "planet", "limit": "1"}, "scope is one of"),
        ({"of": "organization", "limit": "1", "period": "year"}, "period is one of"),
    ],
)
async def test_a_budget_that_cannot_be_is_refused_beside_its_form(
    desk: Desk, fields: dict[str, str], complaint: str
) -> None:
    page = await desk.refused(f"{HERE}/budgets", **({"period": "month"} | fields))
    assert complaint in page
    assert f'value="{fields["limit"]}"' in page
    assert "There is no budget" in page


async def test_a_top_up_goes_to_stripe_and_comes_back_as_credit(
    paying: Desk, stripe_stand_in: StandIn
) -> None:
    assert "between $5.00 and" in await paying.refused(f"{HERE}/top-ups", top_up="3")
    location = await paying.done(f"{HERE}/top-ups", preset="25.00")
    leaving = await paying.http.get(location)
    # Not by a redirect of the form, which the policy of our own pages forbids.
    assert leaving.status_code == 200
    url = leaving.headers["refresh"].removeprefix("0; url=")
    assert url.startswith(stripe_stand_in.url)
    top_up_id = location.split("/")[-1].split("?")[0]
    state = await paying.http.get(f"{HERE}/top-ups/{top_up_id}/state")
    assert "waiting for payment" in state.text
    assert "every 3s" in state.text

    stripe_stand_in.pay_checkout(url.rsplit("/", 1)[1])
    state = await paying.http.get(f"{HERE}/top-ups/{top_up_id}/state")
    assert state.headers["hx-refresh"] == "true"
    assert "every 3s" not in state.text
    page = await paying.page(f"{HERE}?top_up={top_up_id}")
    assert "<dt>Paid credit</dt><dd>$25.00" in page
    assert "ending 4242 is saved at Stripe" in page
    assert "Your top-up" in page

    await paying.done(f"{HERE}/recharge", below="5", amount="25")
    assert 'value="5.00"' in await paying.page()
    await paying.done(f"{HERE}/recharge", below="5", amount="25", stop="1")
    assert 'value="5.00"' not in await paying.page()
    assert "at most two decimals" in await paying.refused(
        f"{HERE}/recharge", below="1.001", amount="25"
    )
    portal = await paying.post(f"{HERE}/portal")
    assert portal.headers["refresh"].startswith(f"0; url={stripe_stand_in.url}/portal/")


async def test_where_bills_go_is_kept(paying: Desk) -> None:
    await paying.done(f"{HERE}/contact", email="bills@example.com")
    assert 'value="bills@example.com"' in await paying.page()
    assert "is not an e-mail address" in await paying.refused(f"{HERE}/contact", email="bills")


async def test_notices_stand_on_every_page_until_dismissed(desk: Desk) -> None:
    async with desk.database.write() as session:
        await notify(session, desk.tenant.id, "low_balance", "Less than <$5> is left.", {})
    for path in ("/console/models", "/console/usage", HERE):
        assert "Less than <$5> is left." in await desk.page(path)
    raw = (await desk.http.get("/console/keys")).text
    assert "Less than &lt;$5&gt; is left." in raw
    notice_id = re.findall(r"/console/notices/(\w+)/dismiss", raw)[0]
    assert await desk.done(f"/console/notices/{notice_id}/dismiss", next="/console/keys") == (
        "/console/keys"
    )
    assert "is left." not in await desk.page("/console/keys")
    async with desk.database.read() as session:
        notice = await session.get_one(Notice, notice_id)
    assert notice.dismissed_at is not None
    assert await desk.done(
        f"/console/notices/{notice_id}/dismiss", next="https://elsewhere.example/"
    ) == ("/console/overview")
