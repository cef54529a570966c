"""Every page of the console is looked at by axe-core, in light and dark, on a desk, a tablet and a
phone, where nothing is scrolled sideways; and people who use no mouse get everywhere."""

from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

import pytest
from playwright.async_api import BrowserContext, Page

from app.settings import Settings
from tests.app.console.conftest import CHROMIUM
from tests.app.console.whole_console import (
    BEFORE_SESSION,
    WholeConsole,
    browser_at,
    whole_console,
)

AXE = (files("axe_playwright_python") / "axe.min.js").read_text()
DESK, TABLET, PHONE = (
    {"width": width, "height": height} for width, height in ((1440, 900), (820, 1180), (390, 844))
)
OF_SCHEME = ["color-contrast"]  # what else a scheme could change
# Pages that say why not, which are to be good pages too.
REFUSED = ("/console/models/embedder/playground", "/console/setup/none", "/console/invitation/none")
RUN = "rules => axe.run(document, rules ? {runOnly: rules} : {}).then(found => found.violations)"
# What has to be scrolled sideways to be read, or lies outside of the screen. Code may.
SIDEWAYS = """() => {
  const found = document.documentElement.scrollWidth > innerWidth ? ["the document"] : [];
  const isOut = (at) => {
    const box = at.getBoundingClientRect();
    return box.left < -1 || box.right > innerWidth + 1;
  };
  const isHidden = (at) => at && (getComputedStyle(at).clipPath !== "none"
    || isHidden(at.parentElement));
  for (const at of document.body.querySelectorAll("*:not(pre, pre *, svg *)")) {
    if (!at.checkVisibility() || isHidden(at)) continue;
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(at).overflowX)
      && at.scrollWidth > at.clientWidth;
    if (scrolls || (isOut(at) && !isOut(at.parentElement)))
      found.push(`${at.cloneNode().outerHTML.slice(0, 100)} in ${at.parentElement.className}`);
  }
  return found;
}"""
OPEN_ALL = """() => {
  for (const at of document.querySelectorAll("details")) at.open = true;
  return new Promise(done => requestAnimationFrame(() => setTimeout(done)));
}"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}"),
]


@pytest.fixture
async def console(settings: Settings) -> AsyncIterator[WholeConsole]:
    async with whole_console(settings) as console:
        yield console


async def _violations(page: Page, what: str, rules: list[str] | None = None) -> list[str]:
    found: list[dict[str, Any]] = await page.evaluate(RUN, rules)
    return [
        f"{what}: {each['id']} ({each['impact']}): {node['target']}"
        f" {node['html'][:160]} {node['failureSummary'].splitlines()[-1].strip()}"
        for each in found
        for node in each["nodes"]
    ]


async def _look(page: Page, address: str) -> list[str]:
    await page.set_viewport_size(DESK)  # type: ignore[arg-type]
    await page.emulate_media(color_scheme="light", reduced_motion="reduce")
    answer = await page.goto(address, wait_until="load")
    assert answer is not None
    is_right = answer.status == (404 if address.endswith("nothing") else 200)
    told = [] if is_right or address in REFUSED else [f"{address}: {answer.status}"]
    told += await _violations(page, address)
    await page.set_viewport_size(TABLET)  # type: ignore[arg-type]
    await page.evaluate(OPEN_ALL)
    told += await _violations(page, f"{address} on a tablet")
    await page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    told += await _violations(page, f"{address} dark", OF_SCHEME)
    await page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    await page.evaluate(OPEN_ALL)
    told += await _violations(page, f"{address} dark on a phone")
    sideways: list[str] = await page.evaluate(SIDEWAYS)
    return told + [f"{address} sideways on a phone: {each}" for each in sideways]


async def _page(context: BrowserContext) -> Page:
    page = await context.new_page()
    await page.add_init_script(AXE)  # outside of the page's content security policy
    return page


@pytest.mark.slow
@pytest.mark.timeout(900)  # three widths of every page
async def test_axe_finds_nothing_on_any_page(console: WholeConsole) -> None:
    problems: list[str] = []
    async with browser_at(console) as context:
        page = await _page(context)
        for address in console.addresses:
            problems += await _look(page, address)
    async with browser_at(console, cookies=False) as context:
        page = await _page(context)
        for address in BEFORE_SESSION:
            problems += await _look(page, address)
    assert problems == [], "\n".join(problems)


# --- without a mouse ----------------------------------------------------------------------

# What Tab should reach: a group of radio buttons once, nothing that is hidden.
STOPS = """() => {
  const all = document.querySelectorAll(
    'a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex="0"]');
  const groups = new Set();
  return [...all].filter((stop) => {
    if (stop.disabled || stop.tabIndex < 0 || !stop.checkVisibility()) return false;
    if (stop.type !== "radio") return true;
    const isNew = !groups.has(stop.name);
    groups.add(stop.name);
    return isNew;
  }).length;
}"""
# Where the focus is: whether it is new, whether it can be seen, and what it is on. Null once it has
# been everywhere. A date has stops within itself.
FOCUS = """() => {
  const at = document.activeElement;
  if (!at || at === document.body || (at.matches(".skip") && at.dataset.wasSeen)) return null;
  const ringed = at.closest(".chooser") ?? at;
  const style = getComputedStyle(ringed), box = ringed.getBoundingClientRect();
  const times = Number(at.dataset.wasSeen ?? 0) + 1;
  at.dataset.wasSeen = times;
  return {
    isNew: times === 1,
    isCaught: times > (at.type === "date" ? 5 : 1),
    isSeen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2
      && box.width > 0 && box.bottom > 0 && box.top < innerHeight,
    html: at.outerHTML.slice(0, 120),
  };
}"""


async def _tab_through(page: Page, address: str, width: dict[str, int]) -> list[str]:
    await page.set_viewport_size(width)  # type: ignore[arg-type]
    await page.goto(address, wait_until="load")
    problems: list[str] = []
    num_stops = 0
    for _ in range(400):
        await page.keyboard.press("Tab")
        focus: dict[str, Any] | None = await page.evaluate(FOCUS)
        if focus is None:
            break  # out at the end, to the browser itself
        num_stops += focus["isNew"]
        if focus["isCaught"]:
            return [*problems, f"{address}: caught at {focus['html']}"]
        if not focus["isSeen"]:
            problems.append(f"{address}: no ring around {focus['html']}")
    expected: int = await page.evaluate(STOPS)
    if num_stops < expected:
        problems.append(f"{address}: {num_stops} of {expected} stops")
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("width", [DESK, PHONE], ids=["desk", "phone"])
async def test_tab_reaches_everything_is_seen_and_caught_nowhere(
    console: WholeConsole, width: dict[str, int]
) -> None:
    problems: list[str] = []
    async with browser_at(console, reduced_motion="reduce") as context:
        page = await context.new_page()
        for address in (
            "/console/models",
            "/console/models/decoder",
            "/console/models/decoder/playground",
            "/console/upload",
            "/console/usage",
            "/console/keys",
            "/console/billing",
        ):
            problems += await _tab_through(page, address, width)
    assert problems == [], "\n".join(problems)


async def test_the_first_stop_skips_to_the_content(console: WholeConsole) -> None:
    async with browser_at(console) as context:
        page = await context.new_page()
        await page.goto("/console/billing", wait_until="load")
        await page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to content")
        box = await skip.bounding_box()
        assert box is not None
        assert box["y"] >= 0, "it shows itself"
        await page.keyboard.press("Enter")
        await page.keyboard.press("Tab")
        is_inside = "document.activeElement.closest('main') !== null"
        assert await page.evaluate(is_inside)


async def test_on_a_phone_one_menu_leads_everywhere_by_keyboard_and_without_scripts(
    console: WholeConsole,
) -> None:
    async with browser_at(console, java_script_enabled=False, viewport=PHONE) as context:
        page = await context.new_page()
        await page.goto("/console/billing/invoices/none", wait_until="load")
        button = page.get_by_role("button", name="Menu Billing")
        billing = page.get_by_role("link", name="Billing", exact=True)
        models = page.get_by_role("link", name="Models", exact=True)
        assert not await models.is_visible()
        await button.press("Enter")
        assert await models.is_visible()
        assert await billing.first.get_attribute("aria-current") == "true"
        await page.keyboard.press("Escape")
        assert not await models.is_visible()
        await button.press("Enter")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/console/models")
