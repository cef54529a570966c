"""Paying in a real browser against a whole box and a stand-in for Stripe: a budget, a top-up with
the card kept, the balance, an invoice, and a talk with the model that shows what it costs."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import create_engine, insert, select

from app.billing.payments.tables import Invoice, InvoiceLine
from app.organizations.tables import Organization
from tests.app.console.conftest import Box, free_port, serving
from tests.stripe_stand_in.server import StandIn

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WIDTHS = (1280, 768, 390)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paid_box")


@pytest.fixture(scope="module")
def box(data_dir: Path) -> Iterator[Box]:
    """Takes payments from a stand-in for Stripe, which also tells it of them."""
    port = free_port()
    with StandIn() as stand_in:
        stand_in.webhooks.deliver_to(f"http://127.0.0.1:{port}/webhooks/stripe")
        with serving(
            data_dir,
            port,
            TAPEOUT_STRIPE_API_KEY=stand_in.api_key,
            TAPEOUT_STRIPE_API_BASE=stand_in.url,
            TAPEOUT_STRIPE_WEBHOOK_SECRET=stand_in.webhook_secret,
        ) as box:
            yield box


def test_a_budget_a_top_up_and_an_invoice(box: Box, owner: Page, data_dir: Path) -> None:
    page = owner
    page.get_by_role("link", name="Billing", exact=True).click()
    budgets = page.locator("#budgets")
    budgets.get_by_label("At most").fill("lots")
    budgets.get_by_role("button", name="Set the budget").click()
    expect(budgets).to_contain_text("A budget is an amount such as 12.50")
    budgets.get_by_label("At most").fill("5")
    budgets.get_by_role("button", name="Set the budget").click()
    expect(budgets.get_by_role("row", name="The organization")).to_contain_text("$5.00")

    top_up(page)
    expect(page.locator(".gauges")).to_contain_text("Paid credit$25.00")
    expect(page.locator("#top-ups")).to_contain_text("paid")
    expect(page.locator("#card")).to_contain_text("4242 is saved at Stripe")
    page.get_by_label("When less is left than", exact=True).fill("5")
    page.get_by_label("the saved card pays").fill("25")
    page.locator("#recharge").get_by_role("button", name="Set").click()
    expect(page.locator("#recharge header .lamp")).to_have_text("on")

    add_invoice(data_dir)
    page.reload()
    page.locator("#invoices").get_by_role("link", name="2026-10").click()
    expect(page.get_by_role("row", name="To pay")).to_contain_text("$13.51")
    expect(page.get_by_role("row", name="support-bot")).to_contain_text("per 1M")

    budgets = page.locator("#budgets")
    page.get_by_role("link", name="Billing", exact=True).first.click()
    budgets.get_by_role("button", name="Remove").click()
    expect(budgets).to_contain_text("There is no budget")


def top_up(page: Page) -> None:
    """Over to Stripe's page, and back from it."""
    page.get_by_role("button", name="25.00").click()
    pay = page.get_by_role("button", name="Pay")
    expect(pay).to_be_visible(timeout=20_000)
    pay.click()
    page.wait_for_url("**/console/billing?top_up=*")
    # The page follows by itself until Stripe has said that it is paid.
    expect(page.locator("#top-up-state .lamp")).to_have_text("paid", timeout=20_000)


def add_invoice(data_dir: Path) -> None:
    """As the end of a month makes one."""
    engine = create_engine(f"sqlite:///{data_dir / 'data' / 'tapeout.db'}")
    with engine.begin() as connection:
        organization = connection.execute(select(Organization.id, Organization.name)).one()
        connection.execute(
            insert(Invoice),
            {
                "id": "inv_1",
                "number": 1,
                "organization_id": organization.id,
                "organization_name": organization.name,
                "period": "2026-10",
                "state": "finalised",
                "currency": "usd",
                "usage_nano": 13_510_000_000,
                "credit_nano": 0,
                "carry_in_nano": 0,
                "due_cents": 1351,
                "carry_out_nano": 0,
                "error": "",
                "created_at": datetime(2026, 11, 1, tzinfo=UTC),
            },
        )
        connection.execute(
            insert(InvoiceLine),
            {
                "invoice_id": "inv_1",
                "position": 1,
                "endpoint_name": "support-bot",
                "dimension": "output",
                "service_class": "standard",
                "price_nano": 400_000_000,
                "unit_scale": 1_000_000,
                "quantity": 33_775_000,
                "amount_nano": 13_510_000_000,
            },
        )
    engine.dispose()


def test_no_page_is_wider_than_its_window(box: Box, owner: Page) -> None:
    page = owner
    names = ("models", "upload", "keys", "usage", "requests", "billing", "prices", "earnings",
             "books", "organizations")  # fmt: skip
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for name in names:
            page.goto(f"{box.url}/console/{name}")
            expect(page.get_by_role("heading", level=1)).to_be_visible()
            room = page.evaluate(
                "document.documentElement.clientWidth - document.documentElement.scrollWidth"
            )
            assert room >= 0, (name, width)
