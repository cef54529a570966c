"""The form of prices in a real browser: the Enter key, a mistake, the preview, and a book that is
scheduled and taken back."""

import pytest
from playwright.sync_api import Page, expect

from tests.app.console.conftest import Box

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_prices_are_scheduled_and_taken_back(box: Box, owner: Page) -> None:
    page = owner
    page.get_by_role("link", name="Prices").click()
    page.get_by_role("link", name="Change prices").click()
    first = page.get_by_label("Price, row 1", exact=True)
    first.fill("much")
    first.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="Row 1")).to_be_visible()
    first.fill("0.125")
    page.get_by_label("Takes effect").fill("2999-01-01T00:00")
    first.press("Enter")
    expect(page.get_by_role("heading", name="Preview of new prices")).to_be_visible()
    row = page.get_by_role("row").filter(has_text="Any model, input").filter(has_text="changed")
    expect(row).to_contain_text("$0.125 per million tokens")
    page.get_by_role("button", name="Back to editing").click()
    expect(first).to_have_value("0.125")
    page.get_by_role("button", name="Preview", exact=True).click()
    page.get_by_role("button", name="Schedule for 2999-01-01 00:00 UTC").click()
    expect(page.get_by_text("The new prices are scheduled.")).to_be_visible()

    page.get_by_role("row").filter(has_text="scheduled").get_by_role("link").click()
    page.get_by_role("link", name="Cancel this book").click()
    page.get_by_role("button", name="Cancel the book").click()
    expect(page.get_by_text("The scheduled price book is gone.")).to_be_visible()
