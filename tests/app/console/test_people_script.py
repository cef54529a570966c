"""Members, keys, the overview and the box's page in a real browser, by two people at once."""

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.app.console.conftest import PASSWORD, Box

WIDTHS = (390, 820, 1280)


def test_somebody_is_let_in_and_out_again(owner: Page, box: Box, browser: Browser) -> None:
    owner.goto(f"{box.url}/console/members")
    owner.get_by_label("For", exact=True).fill("Grace")
    owner.get_by_label("viewer", exact=False).first.check()
    owner.get_by_role("button", name="Make a one-time link").click()
    owner.get_by_role("button", name="Copy").click()
    expect(owner.get_by_role("button", name="Copied")).to_be_visible()
    link = owner.evaluate("navigator.clipboard.readText()")
    context = browser.new_context()
    other = context.new_page()
    other.goto(link)
    other.get_by_label("E-mail").fill("grace@example.com")
    other.keyboard.press("Tab")
    other.keyboard.type(PASSWORD)
    other.keyboard.press("Enter")
    other.wait_for_url("**/console/overview")
    assert other.get_by_role("link", name="Upload").count() == 0
    expect(other.get_by_text("Your role may only look.")).to_be_visible()

    owner.goto(f"{box.url}/console/members")
    row = owner.get_by_role("row", name=re.compile("grace@example.com"))
    row.get_by_role("combobox").select_option("member")
    row.get_by_role("button", name="Change").click()
    expect(owner.get_by_text("The role is changed")).to_be_visible()
    other.reload()
    expect(other.get_by_role("link", name="Upload", exact=True)).to_be_visible()

    row.get_by_role("link", name="Remove").click()
    owner.get_by_role("button", name="Remove from the organization").click()
    expect(owner.get_by_text("They are no member any more.")).to_be_visible()
    other.reload()
    other.wait_for_url("**/console/sign-in**")
    other.goto(link)
    expect(other.get_by_text("was used, was revoked, or has ended")).to_be_visible()
    context.close()


def test_the_last_owner_is_told_why_they_stay(owner: Page, box: Box) -> None:
    owner.goto(f"{box.url}/console/account")
    owner.get_by_role("link", name="Leave").click()
    owner.get_by_role("button", name="Leave the organization").click()
    expect(owner.get_by_role("alert").last).to_contain_text("make another member owner first")


def test_a_key_is_limited(owner: Page, box: Box) -> None:
    owner.goto(f"{box.url}/console/keys")
    owner.get_by_label("Name").fill("nightly")
    owner.get_by_label("Expires", exact=True).select_option("30")
    owner.get_by_label("May spend at most").fill("5")
    owner.get_by_role("button", name="Create key").click()
    expect(owner.get_by_label("The new key")).to_have_value(re.compile("^tp-"))
    owner.get_by_role("link", name="nightly").first.click()
    expect(owner.get_by_text("works until")).to_be_visible()
    expect(owner.get_by_text("$5.00", exact=True)).to_be_visible()
    owner.get_by_role("button", name="Remove").click()
    expect(owner.get_by_text("As much as the organization may.")).to_be_visible()


def test_the_operator_sees_the_machine_and_makes_an_organization(owner: Page, box: Box) -> None:
    owner.goto(f"{box.url}/console/box")
    expect(owner.get_by_text("Nothing runs.")).to_be_visible()
    expect(owner.get_by_role("meter")).to_be_visible()
    owner.goto(f"{box.url}/console/organizations")
    owner.get_by_label("Name").fill("acme")
    owner.get_by_role("button", name="Make it").click()
    expect(owner.get_by_label("The link")).to_have_value(re.compile("/console/invitation/"))


@pytest.mark.parametrize("path", ["overview", "members", "account", "keys", "box", "organizations"])
def test_pages_fit_their_windows(owner: Page, box: Box, path: str) -> None:
    owner.goto(f"{box.url}/console/{path}")
    for width in WIDTHS:
        owner.set_viewport_size({"width": width, "height": 800})
        too_wide = owner.evaluate(
            "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        )
        assert not too_wide, width
