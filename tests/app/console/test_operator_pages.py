"""Invoices, notice settings, and the operator's page of organizations, over a whole box."""

import re
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from sqlalchemy import select

from app.billing.credits import open_lots
from app.billing.payments.tables import BillingProfile, Notice
from app.billing.tables import AccountBalance
from app.core import clock
from app.organizations.tables import Organization
from app.settings import Settings
from tests.app.console.test_billing_pages import HERE, Desk
from tests.app.tenancy_objects import add_objects
from tests.app.whole_app import add_tenant, client, form_token, running

PLACES = "/console/organizations"


@pytest.fixture
async def operator(settings: Settings) -> AsyncIterator[Desk]:
    async with running(settings, has_clerk=False) as application, client(application) as http:
        tenant = await add_tenant(application, "operators", is_operator=True)
        http.cookies.update(tenant.cookies)
        yield Desk(application, http, tenant)


async def test_an_invoice_is_read_down_to_its_file(operator: Desk) -> None:
    owned = await add_objects(operator.application, operator.tenant)
    page = await operator.page()
    assert f"{HERE}/invoices/{owned.invoice_id}" in page
    page = await operator.page(f"{HERE}/invoices/{owned.invoice_id}")
    for said in ("Invoice 1", "to be paid", "quibble-model", "$7.123456000", "$7,123.45"):
        assert said in page, said
    line = await operator.page(f"{HERE}/invoices/{owned.invoice_id}/lines/1")
    assert "The single requests are no longer kept" in line
    file = await operator.http.get(f"{HERE}/invoices/{owned.invoice_id}/file")
    assert file.headers["content-type"].startswith("text/csv")
    assert "invoice-1.csv" in file.headers["content-disposition"]
    assert "7.123456" in file.text
    assert (
        await operator.http.get(f"{HERE}/invoices/{owned.invoice_id}/lines/9")
    ).status_code == 404


async def test_the_secret_of_notices_is_shown_once(operator: Desk) -> None:
    refused = await operator.refused(f"{HERE}/notices", notify_url="ftp://example.com")
    assert "Enter an https address" in refused
    assert 'value="ftp://example.com"' in refused
    assert "This is not an amount" in await operator.refused(f"{HERE}/notices", low_balance="low")
    shown = await operator.post(
        f"{HERE}/notices", notify_url="https://example.com/told", low_balance="20"
    )
    assert shown.status_code == 200
    secret = re.findall(r"nsec_[\w-]+", shown.text)[0]
    async with operator.database.read() as session:
        profile = await session.get_one(BillingProfile, operator.tenant.id)
    assert (profile.notify_secret, profile.low_balance_nano) == (secret, 20 * 10**9)
    page = await operator.page()
    assert secret not in page
    assert 'value="https://example.com/told"' in page
    # Saving the same address again keeps the secret; a new one is asked for.
    await operator.done(f"{HERE}/notices", notify_url="https://example.com/told")
    renewed = await operator.post(
        f"{HERE}/notices", notify_url="https://example.com/told", new_secret="1"
    )
    assert secret not in renewed.text
    assert "nsec_" in renewed.text


async def test_a_test_is_sent_to_the_address_and_disturbs_nobody(operator: Desk) -> None:
    answer = await operator.post(f"{HERE}/notices/test")
    assert answer.status_code == 409
    await operator.post(f"{HERE}/notices", notify_url="https://example.com/told")
    await operator.done(f"{HERE}/notices/test")
    assert (await operator.post(f"{HERE}/notices/test")).status_code == 429
    async with operator.database.read() as session:
        rows = (await session.scalars(select(Notice))).all()
    assert len(rows) == 1
    page = await operator.page()
    assert "This is a test" in page.split('id="notices"')[1]
    assert "/dismiss" not in page


async def test_the_operator_sets_how_an_organization_pays(operator: Desk) -> None:
    customer = await add_tenant(operator.application, "Acme & Sons")
    here = f"{PLACES}/{customer.id}"
    assert "Acme & Sons" in await operator.page(PLACES)
    for fields, limit_nano in (
        ({"mode": "prepaid"}, 0),
        ({"mode": "limited", "limit": "12.50"}, 12_500_000_000),
        ({"mode": "unlimited"}, None),
    ):
        await operator.done(f"{here}/limit", **fields)
        async with operator.database.read() as session:
            account = await session.get_one(AccountBalance, customer.id)
        assert account.credit_limit_nano == limit_nano
    for fields, complaint in (
        ({"mode": "limited", "limit": ""}, "A spending limit is an amount"),
        ({"mode": "limited", "limit": "0"}, "A limit of nothing is prepaid"),
        ({"mode": "free"}, "Choose how it pays"),
    ):
        assert complaint in await operator.refused(f"{here}/limit", **fields)
    assert (await operator.post(f"{PLACES}/org_none/limit", mode="prepaid")).status_code == 404
    assert (await operator.http.get(f"{PLACES}/org_none")).status_code == 404


async def test_credit_is_given_once_for_each_form(operator: Desk) -> None:
    customer = await add_tenant(operator.application, "acme")
    here = f"{PLACES}/{customer.id}"
    grant_id = re.findall(r'name="grant_id" value="(\w+)"', await operator.page(here))[0]
    gift = {"credit": "5", "kind": "promotional", "note": "Hello", "grant_id": grant_id}
    for _ in range(2):
        await operator.done(f"{here}/credits", **gift, expires_on="2999-01-31")
    async with operator.database.read() as session:
        (lot,) = await open_lots(session, customer.id)
    assert (lot.remaining_nano, lot.note, lot.kind) == (5 * 10**9, "Hello", "promotional")
    assert lot.expires_at is not None
    assert lot.expires_at.isoformat() == "2999-01-31T00:00:00+00:00"
    for wrong, complaint in (
        ({"credit": "0"}, "Credit is more than nothing"),
        ({"credit": "-5"}, "Credit is an amount"),
        ({"expires_on": "2020-01-01"}, "That day is past"),
        ({"expires_on": "soon"}, "Give the day it ends"),
        ({"kind": "stolen"}, "Choose whether it is given or paid"),
        ({"note": "x" * 201}, "A note has at most 200"),
        ({"grant_id": ""}, "This form is out of date"),
    ):
        fields = gift | {"grant_id": "another"} | wrong
        assert complaint in await operator.refused(f"{here}/credits", **fields), wrong


async def test_credit_that_has_ended_is_not_refused_when_its_form_comes_again(
    operator: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    customer = await add_tenant(operator.application, "acme")
    path = f"{PLACES}/{customer.id}/credits"
    tomorrow = clock.now() + timedelta(days=1)
    gift = {"credit": "5", "kind": "promotional", "expires_on": f"{tomorrow:%Y-%m-%d}"}
    await operator.done(path, **gift, grant_id="one")
    monkeypatch.setattr(clock, "now", lambda: tomorrow)
    await operator.done(path, **gift, grant_id="one")
    assert "That day is past" in await operator.refused(path, **gift, grant_id="two")
    later = gift | {"expires_on": "2999-01-31"}
    refused = await operator.refused(path, **later, grant_id="one")
    assert "Other credit was given under this key" in refused


async def test_a_form_sent_again_with_other_credit_is_refused(operator: Desk) -> None:
    customer = await add_tenant(operator.application, "acme")
    here = f"{PLACES}/{customer.id}"
    await operator.done(f"{here}/credits", credit="5", kind="promotional", grant_id="one")
    refused = await operator.refused(f"{here}/credits", credit="50", kind="paid", grant_id="one")
    assert "Other credit was given under this key" in refused
    # The answer's own form has another key, so that sending it gives the credit.
    grant_id = re.findall(r'name="grant_id" value="(\w+)"', refused)[0]
    await operator.done(f"{here}/credits", credit="50", kind="paid", grant_id=grant_id)
    async with operator.database.read() as session:
        lots = await open_lots(session, customer.id)
    assert [lot.remaining_nano for lot in lots] == [5 * 10**9, 50 * 10**9]


async def test_more_credit_than_an_account_holds_is_refused(operator: Desk) -> None:
    customer = await add_tenant(operator.application, "acme")
    here = f"{PLACES}/{customer.id}/credits"
    for number in range(4):
        sent = {"credit": "1000000000", "kind": "promotional", "grant_id": f"grant{number}"}
        await operator.done(here, **sent)
    refused = await operator.refused(here, credit="1", kind="promotional", grant_id="another")
    assert "An account holds at most" in refused


async def test_customers_have_no_page_of_organizations(operator: Desk) -> None:
    customer = await add_tenant(operator.application, "acme")
    async with client(operator.application) as http:
        http.cookies.update(customer.cookies)
        answer = await http.get(PLACES)
        assert answer.status_code == 403
        page = (await http.get("/console/usage")).text
    assert "/console/billing" in page
    for path in (PLACES, "/console/prices", "/console/books", "/console/earnings"):
        assert path not in page


async def test_a_new_organization_gets_a_link_for_its_owner(operator: Desk) -> None:
    http = operator.http
    form = {"csrf_token": operator.tenant.csrf_token}
    headers = {"Origin": "http://testserver.local"}
    made = await http.post(PLACES, data=form | {"name": "acme"}, headers=headers)
    assert made.status_code == 200, made.text
    assert "Link for an owner of acme" in made.text
    for name, status in (("acme", 409), ("", 400)):
        refused = await http.post(PLACES, data=form | {"name": name}, headers=headers)
        assert refused.status_code == status
        assert 'role="alert"' in refused.text or 'class="error"' in refused.text
    async with operator.database.read() as session:
        organization = await session.scalar(select(Organization).where(Organization.name == "acme"))
        assert organization is not None
        account = await session.get_one(AccountBalance, organization.id)
        assert account.credit_limit_nano == 0
    here = f"{PLACES}/{organization.id}"
    assert f"{here}/owner" in (await http.get(here)).text
    again = await http.post(f"{here}/owner", data=form, headers=headers)
    links = [re.findall(r'id="link" readonly value="([^"]+)"', page.text) for page in (made, again)]
    (lost,), (path,) = (
        [link.removeprefix("http://testserver.local") for link in links_in] for links_in in links
    )
    async with client(operator.application) as stranger:
        assert (await stranger.get(lost)).status_code == 403
        page = await stranger.get(path)
        assert "Join acme" in page.text
        sent = {"email": "a@acme.example", "password": "four random words"}
        done = await stranger.post(
            path, data=sent | {"csrf_token": form_token(page.text)}, headers=headers
        )
        assert done.status_code == 303
        assert "owner of acme" in (await stranger.get("/console/account")).text
    assert f"{here}/owner" not in (await http.get(here)).text
    refused = await http.post(f"{here}/owner", data=form, headers=headers)
    assert refused.status_code == 409
    assert "tapeout reset-password" in refused.text
