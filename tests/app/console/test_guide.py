"""The guides as pages: rendered safely, linked to each other, open to everybody; and the API
reference in a real browser that may load nothing from elsewhere."""

import re

import httpx
import pytest
from playwright.sync_api import Page

from app.console.guide import DOCS_DIR, GROUPS, library
from app.console.markdown import read_document
from tests.app.console.conftest import Box, Console

LINK = re.compile(r'href="([^"]*)"')


def test_markdown_becomes_pages() -> None:
    document = read_document(
        "# A *guide*\n\nSays one thing. And `more`.\n\n## With `code`, and more\n\n"
        "[stripe.md](stripe.md#set-it-up) [below](#with-code-and-more) [out](https://example.com/)\n\n"
        "## With `code`, and more\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n\n"
        '<script>alert(1)</script> <img src="//example.com/x">\n\n```sh\necho "<b>"\n```\n\n'
        "```mermaid\nflowchart LR\n```\n",
        {"stripe.md": "Stripe & co."},
    )
    assert (document.title, document.summary) == ("A guide", "Says one thing.")
    assert [section.anchor for section in document.sections] == [
        "with-code-and-more",
        "with-code-and-more-1",
    ]
    html = str(document.html)
    assert LINK.findall(html) == [
        "/guide/stripe#set-it-up",
        "#with-code-and-more",
        "https://example.com/",
    ]
    assert ">Stripe &amp; co.</a>" in html
    assert "<script" not in html
    assert "<img" not in html
    assert "style=" not in html, "the content security policy refuses it"
    assert '<td class="number">1</td>' in html
    assert "echo &#34;&lt;b&gt;&#34;" in html
    assert html.count("data-copy") == 1, "a drawing is not for the clipboard"


async def test_every_document_is_a_page_that_anybody_may_read(console: Console) -> None:
    listed = await console.client.get("/guide")
    assert listed.status_code == 200
    names = {path.stem for path in DOCS_DIR.glob("*.md")}
    assert {name for group in GROUPS.values() for name in group} == names
    for name in names:
        assert f'href="/guide/{name}"' in listed.text
        page = await console.client.get(f"/guide/{name}")
        assert page.status_code == 200, name
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.text.count("<h1") == 1, name
        assert library()[name].document.summary, name
        targets = LINK.findall(page.text)
        for target in targets:
            path, _, anchor = target.partition("#")
            if path.startswith("/guide/"):
                linked = path.removeprefix("/guide/")
                assert linked in names, f"{name} links to {target}"
                assert not anchor or f'id="{anchor}"' in library()[linked].document.html, target
            elif not path:
                assert f'id="{anchor}"' in page.text, f"{name}: #{anchor}"
            else:
                known = ("/guide", "/docs", "/console/", "https://")
                assert target.startswith(known), f"{name} links to {target}"


async def test_an_unknown_guide_says_where_all_are(console: Console) -> None:
    for name in ("none", "README", "stripe.md"):
        page = await console.client.get(f"/guide/{name}", headers={"Accept": "text/html"})
        assert page.status_code == 404
        assert "listed at /guide" in page.text
    assert (await console.client.get("/guide/..%2Fpyproject.toml")).status_code == 404


async def test_who_is_signed_in_keeps_the_console_around(owned: Console) -> None:
    assert 'aria-label="Main"' in (await owned.client.get("/guide/pricing")).text
    owned.client.cookies.clear()
    page = await owned.client.get("/guide/pricing")
    assert page.status_code == 200
    assert 'aria-label="Main"' not in page.text


@pytest.mark.browser
def test_a_reader_goes_from_the_console_to_a_guide(box: Box, owner: Page) -> None:
    owner.get_by_role("link", name="Guides", exact=True).click()
    owner.get_by_role("main").get_by_role("link", name="Stripe", exact=True).click()
    owner.get_by_role("article").get_by_role("link", name="Money", exact=True).click()
    owner.wait_for_url("**/guide/money")
    assert owner.get_by_role("heading", level=1).inner_text() == "Money"
    owner.goto(f"{box.url}/guide/stripe")
    owner.get_by_role("button", name="Copy").first.click()
    copied = owner.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("curl -d")
    for width in (390, 768, 1280):
        owner.set_viewport_size({"width": width, "height": 900})
        overflow = owner.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, width


@pytest.mark.browser
def test_the_api_reference_shows_every_operation_and_asks_nobody_else(box: Box, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{box.url}/docs", wait_until="networkidle")
    schema = httpx.get(f"{box.url}/docs/openapi.json").json()
    operations = [operation for item in schema["paths"].values() for operation in item.values()]
    assert len(operations) > 80
    shown = page.locator("main section")
    assert shown.count() == len(operations)
    assert {section.get_attribute("id") for section in shown.all()} == {
        operation["operationId"] for operation in operations
    }
    page.get_by_role("navigation").get_by_role("link", name="Create a chat completion").click()
    assert page.locator("section:target h3").inner_text() == "Create a chat completion"
    page.locator("section:target summary").first.click()
    assert "messages[].role" in page.locator("section:target").inner_text()
    page.goto(f"{box.url}/guide/design", wait_until="networkidle")
    assert {url for url in asked if not url.startswith((box.url, "data:"))} == set()
