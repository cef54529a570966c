"""The documentation page and the schema behind it."""

import re
from html.parser import HTMLParser

import httpx


async def test_the_page_names_every_operation(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/docs/openapi.json")).json()
    page = await client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    operations = [operation for item in schema["paths"].values() for operation in item.values()]
    assert len(operations) > 20
    for operation in operations:
        assert f'id="{operation["operationId"]}"' in page.text
        assert operation["summary"]
        assert operation["description"]
    for path in schema["paths"]:
        assert path in page.text


async def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script(
    client: httpx.AsyncClient,
) -> None:
    class Links(HTMLParser):
        found: list[str] = []  # noqa: RUF012
        tags: set[str] = set()  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            self.found += [value or "" for name, value in attrs if name in ("href", "src")]

    parser = Links()
    parser.feed((await client.get("/docs")).text)
    assert "script" not in parser.tags
    assert all(link.startswith(("#", "/docs", "data:,")) for link in parser.found)
    style = await client.get("/docs/style.css")
    assert style.headers["content-type"].startswith("text/css")
    assert not re.search(r"url\(|@import", style.text)


async def test_bodies_are_shown_field_by_field(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    for text in ("expires_at", "versions[].phase_detail", "spending_limit", "date-time or null"):
        assert text in page


async def test_tools_find_the_schema(client: httpx.AsyncClient) -> None:
    response = await client.get("/openapi.json", follow_redirects=True)
    assert response.json()["openapi"].startswith("3.")
    assert response.json()["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
