"""The documentation page and the schema behind it."""

import json
import re
from html.parser import HTMLParser

import httpx

from app.api import documentation
from app.main import create_app
from app.settings import Settings


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
    assert all(link.startswith(("#", "/docs", "/guide", "data:,")) for link in parser.found)
    style = await client.get("/docs/style.css")
    assert style.headers["content-type"].startswith("text/css")
    assert not re.search(r"url\(|@import", style.text)


async def test_the_page_may_not_run_scripts_or_be_framed(client: httpx.AsyncClient) -> None:
    for path in ("/docs", "/docs/openapi.json", "/docs/style.css"):
        headers = (await client.get(path)).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "script-src" not in policy
        assert headers["x-content-type-options"] == "nosniff"


async def test_bodies_are_shown_field_by_field(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    for text in ("expires_at", "versions[].phase_detail", "spending_limit", "date-time or null"):
        assert text in page


async def test_tools_find_the_schema(client: httpx.AsyncClient) -> None:
    response = await client.get("/openapi.json", follow_redirects=True)
    assert response.json()["openapi"].startswith("3.")
    assert response.json()["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


async def test_the_whole_box(settings: Settings) -> None:
    """Bodies that routes decode themselves are shown too, and no reference leads nowhere."""
    transport = httpx.ASGITransport(create_app(settings))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://box") as client:
        for _ in range(2):
            page = (await client.get("/docs")).text
            schema = (await client.get("/docs/openapi.json")).json()
    for text in ("messages[].role", "stream_options.include_usage", "upload_id", "inputs"):
        assert text in page
    for path in documentation.BODIES:
        operation = schema["paths"][path]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(schema)))
    assert references
    assert references <= set(schema["components"]["schemas"])
    assert not any(path.startswith("/console") for path in schema["paths"])
