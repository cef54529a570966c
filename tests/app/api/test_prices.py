"""`/api/prices` over HTTP: scheduling, taking back, history, preview, and who may see what."""

from datetime import timedelta
from typing import Any

import openai
import pytest

from app.core import clock
from tests.app.api.conftest import OTHER, Box

OUTPUT: dict[str, Any] = {"dimension": "output", "price_nano": 3_000, "unit_scale": 1}


async def test_prices_are_scheduled_listed_and_taken_back(box: Box) -> None:
    later = (clock.now() + timedelta(days=1)).isoformat()
    async with box.http() as http:
        book = {"items": [OUTPUT], "effective_at": later, "policy": {"cancelled": "waived"}}
        made = (await http.post("/api/prices", json=book)).json()
        assert (made["number"], made["policy"]) == (2, {"cancelled": "waived"})
        history = (await http.get("/api/prices/history")).json()["books"]
        assert [(each["number"], each["status"]) for each in history] == [
            (2, "scheduled"),
            (1, "active"),
        ]
        assert (await http.get("/api/prices")).json()["number"] == 1
        assert (await http.get(f"/api/prices/{made['id']}")).json() == made
        assert (await http.delete(f"/api/prices/{made['id']}")).status_code == 204
        assert (await http.get(f"/api/prices/{made['id']}")).status_code == 404
        assert (await http.delete(f"/api/prices/{made['id']}")).status_code == 404
        active_id = history[1]["id"]
        refused = await http.delete(f"/api/prices/{active_id}")
        assert refused.json()["error"]["code"] == "price_book_in_force"
        changed = {"items": [OUTPUT], "based_on": active_id}
        assert (await http.post("/api/prices", json=changed)).status_code == 201
        again = await http.post("/api/prices", json=changed)
        assert again.json()["error"]["code"] == "prices_changed"
        history = (await http.get("/api/prices/history")).json()["books"]
        assert [each["status"] for each in history] == ["active", "past"]


async def test_a_bad_book_is_refused_by_name(box: Box) -> None:
    cases = (
        ({"items": [OUTPUT], "policy": {"completed": "waived"}}, "policy.completed"),
        ({"items": [OUTPUT], "policy": {"gone": "waived"}}, "policy"),
        ({"items": [{**OUTPUT, "from_minute": 60, "until_minute": 60}]}, "items[0].until_minute"),
        ({"items": [{**OUTPUT, "above_tokens": -1}]}, "items[0].above_tokens"),
        ({"items": [OUTPUT], "effective_at": "2026-01-01T00:00:00"}, "effective_at"),
    )
    async with box.http() as http:
        for path in ("/api/prices", "/api/prices/preview"):
            for body, param in cases:
                response = await http.post(path, json=body)
                assert response.status_code == 400, response.text
                assert response.json()["error"]["param"] == param


async def test_a_preview_rates_past_requests_and_changes_nothing(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    for _ in range(2):
        await client.completions.create(model="tiny", prompt="a b c")
    await box.relay.settled()
    async with box.http() as http:
        before = (await http.get("/api/prices")).json()
        found = (await http.post("/api/prices/preview", json={"items": [OUTPUT]})).json()
        assert (await http.get("/api/prices")).json() == before
    if found["num_events"] == 0:
        pytest.skip("the month began this instant")
    # As settled: 4 new and 2 cached input tokens, 16 of output, 2 requests. Then: output alone.
    old_nano = 400 + 20 + 16 * 400 + 2 * 100
    assert found["models"] == [
        {
            "endpoint_name": "tiny",
            "old_nano": old_nano,
            "new_nano": 16 * 3_000,
            "difference_nano": 16 * 3_000 - old_nano,
        }
    ]
    assert (found["is_estimate"], found["num_events"]) == (False, 2)
    kinds = [change["kind"] for change in found["changes"]]
    assert (kinds.count("changed"), kinds.count("removed")) == (1, 14)


async def test_the_length_of_the_prompt_sets_the_price(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    items = [OUTPUT, {**OUTPUT, "price_nano": 7_000, "above_tokens": 2}]
    async with box.http() as http:
        assert (await http.post("/api/prices", json={"items": items})).status_code == 201
    amounts: list[int] = []
    for prompt in ("a b", "a b c"):
        raw = await client.completions.with_raw_response.create(model="tiny", prompt=prompt)
        amounts.append((await box.receipt(raw.headers["x-request-id"]))["amount_nano"])
    assert amounts == [8 * 3_000, 8 * 7_000]


async def test_a_model_s_own_prices_are_shown_to_those_who_see_it(box: Box) -> None:
    async with box.http() as http, box.http(OTHER) as other:
        items = [OUTPUT, {**OUTPUT, "endpoint_name": "secret", "price_nano": 1}]
        book_id = (await http.post("/api/prices", json={"items": items})).json()["id"]
        shown = (await other.get("/api/prices")).json()
        assert [item["endpoint_name"] for item in shown["items"]] == ["*"]
        for method, path, body in (
            ("GET", "/api/prices/history", None),
            ("GET", f"/api/prices/{book_id}", None),
            ("DELETE", f"/api/prices/{book_id}", None),
            ("POST", "/api/prices/preview", {"items": items}),
        ):
            response = await other.request(method, path, json=body)
            assert response.json()["error"]["code"] == "operator_only"
