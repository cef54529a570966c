"""Counting a prompt's tokens: free, so that it may not keep what others need."""

import asyncio
from typing import Any

import pytest

from app.api.counting import MAX_COUNTS
from runtime.protocol import Generate
from tests.app.api.conftest import OTHER, Box
from tests.app.api.test_faults import until

ROUTES: dict[str, Any] = {
    "/v1/messages/count_tokens": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/responses/input_tokens": lambda text: {"input": text},
}


@pytest.mark.parametrize("route", ROUTES)
async def test_a_count_whose_client_left_keeps_no_place(box: Box, route: str) -> None:
    link = box.fleet.targets["tiny"].link
    body = {"model": "tiny"} | ROUTES[route]("unready")
    async with box.http() as http:
        calls = [asyncio.create_task(http.post(route, json=body)) for _ in range(MAX_COUNTS)]
        await until(lambda: link.num_outstanding == MAX_COUNTS)
        more = await http.post(route, json=body)
        assert (more.status_code, more.json()["error"]["code"]) == (429, "too_many_counts")
        assert more.headers["retry-after"] == "1"
        async with box.http(OTHER) as other:  # whom it does not concern
            counted = await other.post(route, json={"model": "tiny"} | ROUTES[route]("a"))
            assert counted.json()["input_tokens"] == 2
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await until(lambda: link.num_outstanding == 0)
        again = await http.post(route, json={"model": "tiny"} | ROUTES[route]("a b"))
        assert again.json()["input_tokens"] == 3


@pytest.mark.parametrize("route", ROUTES)
async def test_a_prompt_longer_than_the_context_is_counted(box: Box, route: str) -> None:
    async with box.http() as http:
        body = {"model": "tiny"} | ROUTES[route]("x " * 1000)
        assert (await http.post(route, json=body)).json()["input_tokens"] == 1001
    (asked,) = [each for each in box.workers["tiny"].received if isinstance(each, Generate)]
    assert asked.is_count
