"""The table of errors in `docs/clients.md` is true: each status is raised as the class that it
names, by every route for text; and what they cost is the same whichever was called."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from app.api import bodies
from app.billing.service import set_spending_limit
from runtime.protocol import frames
from tests.app.api.conftest import ORGANIZATION, Box

DOCUMENT = Path(__file__).parents[3] / "docs" / "clients.md"
ROW = re.compile(r"^\| (\w+) \| `(\w+Error)` \| `(\w+Error)` \|", re.MULTILINE)
CLASSES = {status: names for status, *names in ROW.findall(DOCUMENT.read_text())}

OBJECT: Any = {"type": "json_object"}
SCHEMA: Any = {"type": "json_schema", "schema": {"type": "object"}}
FORMATS: dict[str, Any] = {
    "chat": {"response_format": OBJECT},
    "respond": {"extra_body": {"text": {"format": OBJECT}}},
    "message": {"output_config": {"format": SCHEMA}},
}

STALL_SECONDS = 0.05

Ask = Callable[..., Awaitable[Any]]


class SlowUplink(httpx2.AsyncHTTPTransport):
    """Sends a body's first half, and the rest after longer than is waited for it."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = await request.aread()

        async def halves() -> AsyncIterator[bytes]:
            yield body[: len(body) // 2]
            await asyncio.sleep(6 * STALL_SECONDS)
            yield body[len(body) // 2 :]

        slow = httpx2.Request(
            request.method, request.url, headers=request.headers, content=halves()
        )
        return await super().handle_async_request(slow)


class Clients:
    """Both SDKs with one key."""

    def __init__(
        self, box: Box, key: str, transport: type[httpx2.AsyncHTTPTransport] | None = None
    ) -> None:
        def client() -> httpx2.AsyncClient | None:
            return httpx2.AsyncClient(transport=transport()) if transport else None

        self.openai = openai.AsyncOpenAI(
            base_url=f"{box.url}/v1", api_key=key, max_retries=0, http_client=client()
        )
        self.claude = anthropic.AsyncAnthropic(
            base_url=box.url, api_key=key, max_retries=0, http_client=client()
        )

    async def __aenter__(self) -> "Clients":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.openai.close()
        await self.claude.close()

    @property
    def routes(self) -> dict[str, Ask]:
        """Each takes a model and a text."""

        async def chat(model: str, text: str, **fields: Any) -> Any:
            said: Any = [{"role": "user", "content": text}]
            create = self.openai.chat.completions.with_raw_response.create
            return await create(model=model, messages=said, **fields)

        async def complete(model: str, text: str, **fields: Any) -> Any:
            text = f"user: {text}"
            create = self.openai.completions.with_raw_response.create
            return await create(model=model, prompt=text, **{"max_tokens": 200} | fields)

        async def respond(model: str, text: str, **fields: Any) -> Any:
            create = self.openai.responses.with_raw_response.create
            return await create(model=model, input=text, **fields)

        async def message(model: str, text: str, **fields: Any) -> Any:
            said: Any = [{"role": "user", "content": text}]
            create = self.claude.messages.with_raw_response.create
            return await create(
                model=model, messages=said, max_tokens=200, **{"extra_body": fields}
            )

        return {"chat": chat, "complete": complete, "respond": respond, "message": message}

    async def fail(
        self,
        status: str,
        model: str = "tiny",
        text: str = "a",
        formats: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        """Every route raises the table's class, and tells the request's id; those of `formats`
        alone where it is given, each with the fields that it has there."""
        asks = {route: self.routes[route] for route in formats or self.routes}
        for route, ask in asks.items():
            name = CLASSES[status][route == "message"]
            expected = getattr(anthropic if route == "message" else openai, name)
            with pytest.raises(expected) as caught:
                await ask(model, text, **fields, **(formats or {}).get(route, {}))
            told: Any = caught.value
            assert str(told.status_code).startswith(status.rstrip("x")), route
            assert told.request_id.startswith("req_")


async def test_each_status_is_raised_as_its_class(box: Box) -> None:
    told = {"400", "401", "402", "403", "404", "408", "413", "422", "429", "5xx"}
    assert CLASSES.keys() == told
    async with Clients(box, "tp-wrong") as stranger, Clients(box, box.keys["read"]) as reader:
        await stranger.fail("401")
        await reader.fail("403")
    async with Clients(box, box.keys[ORGANIZATION], SlowUplink) as slow:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bodies, "STALL_SECONDS", STALL_SECONDS)
            await slow.fail("408")
    async with Clients(box, box.keys[ORGANIZATION]) as clients:
        await clients.fail("400", temperature=9)
        await clients.fail("404", model="absent")
        await clients.fail("5xx", text="fail@0")
        await clients.fail("5xx", text="abort@0")
        await clients.fail("422", text="refuse@0", formats=FORMATS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(frames, "MAX_FRAME_BYTES", 50)
            await clients.fail("413")
        link = box.fleet.targets["tiny"].link
        most, link._max_outstanding = link._max_outstanding, 0
        await clients.fail("429")
        link._max_outstanding = most
        async with box.database.write() as session:
            await set_spending_limit(session, ORGANIZATION, 0, "usd")
        await clients.fail("402")
        assert link.num_outstanding == 0


async def test_every_route_costs_the_same(box: Box) -> None:
    lines: list[list[dict[str, Any]]] = []
    async with Clients(box, box.keys[ORGANIZATION]) as clients:
        for ask in clients.routes.values():
            box.workers["tiny"]._seen.clear()  # nothing is cached
            raw = await ask("tiny", "one two three")
            receipt = await box.receipt(raw.headers["x-request-id"])
            lines.append([line for line in receipt["lines"] if line["dimension"] != "device_ms"])
            assert receipt["outcome"] == "completed"
    assert {line["dimension"]: line["quantity"] for line in lines[0]} == {
        "input": 4,
        "output": 8,
        "request": 1,
    }
    assert lines[1:] == lines[:1] * 3
    async with box.http() as http:
        usage = (await http.get("/api/usage")).json()
    assert usage["held_nano"] == 0
    assert usage["rows"][0]["requests"] == 4
