"""`/metrics`: what its documentation says, for the operator alone."""

import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from litestar import Litestar
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.metering import meters
from app.metering.meters import Meters
from app.metering.records import AdmitRecord, Outcome, Usage
from app.settings import Settings
from tests.app.conftest import ADMIN_KEY
from tests.app.whole_app import add_tenant, client, running

OPERATOR = {"Authorization": f"Bearer {ADMIN_KEY}"}
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "operations.md"


@pytest.fixture
async def app(settings: Settings) -> AsyncIterator[Litestar]:
    async with running(settings) as app:
        yield app


def usage(outcome: Outcome = "completed", num_cached: int = 7, endpoint: str = "tiny") -> Usage:
    started = time.time_ns()
    admitted = AdmitRecord(
        *("req_1", "org_1", "key_1", "k", endpoint, 1, "/v1/completions"),
        *("decoder", "standard", "pb_1", started),
    )
    return Usage(
        admitted=admitted,
        outcome=outcome,
        finish_reason="stop",
        input_tokens=3,
        cached_tokens=num_cached,
        output_tokens=5,
        device_ms=250,
        finished_at_ns=started + 2_000_000_000,
        first_token_ns=20_000_000,
    )


async def test_the_operator_reads_what_was_served(app: Litestar) -> None:
    counters: Meters = app.state.meters
    counters.observe(usage())
    counters.observe(usage("failed", 0))
    counters.refuse("budget_reached")
    async with client(app) as http:
        response = await http.get("/metrics", headers=OPERATOR)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["tapeout_ready",] == 1
    assert samples["tapeout_requests_total", "completed", "tiny"] == 1
    assert samples["tapeout_requests_total", "failed", "tiny"] == 1
    assert samples["tapeout_tokens_total", "cached", "tiny"] == 7
    assert samples["tapeout_tokens_total", "output", "tiny"] == 10
    assert samples["tapeout_device_seconds_total", "tiny"] == 0.5
    assert samples["tapeout_refusals_total", "budget_reached"] == 1
    assert samples["tapeout_request_seconds_sum", "tiny"] == 4
    assert samples["tapeout_unsettled_requests",] == 0


async def test_a_model_that_is_gone_is_in_one_more_scrape(app: Litestar) -> None:
    counters: Meters = app.state.meters
    async with client(app) as http:
        empty = (await http.get("/metrics", headers=OPERATOR)).text
        for index in range(1_000):
            counters.observe(usage(endpoint=f"model-{index}"))
        last = (await http.get("/metrics", headers=OPERATOR)).text
        after = (await http.get("/metrics", headers=OPERATOR)).text
    assert last.count('tapeout_requests_total{endpoint="model-') == 1_000
    assert "model-" not in after
    assert after.count("\n") == empty.count("\n")


def test_a_model_that_serves_keeps_its_counters() -> None:
    counters = Meters()
    for _ in range(2):
        counters.observe(usage())
        counters.observe(usage(endpoint="gone"))
        counters.keep({"tiny", "idle"})
    counted = {"endpoint": "tiny", "outcome": "completed"}
    assert counters.registry.get_sample_value("tapeout_requests_total", counted) == 2
    gone = {**counted, "endpoint": "gone"}
    assert counters.registry.get_sample_value("tapeout_requests_total", gone) is None


def test_names_are_bounded_though_nobody_scrapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes models and deletes them fills neither memory nor the next scrape."""
    monkeypatch.setattr(meters, "MAX_ENDPOINTS", 10)
    counters = Meters()
    for index in range(100):
        counters.observe(usage())
        counters.observe(usage(endpoint=f"model-{index}"))
    text = generate_latest(counters.registry).decode()
    names = set(re.findall(r'endpoint="([^"]*)"', text))
    assert names == {"tiny", *(f"model-{index}" for index in range(91, 100))}
    counted = {"endpoint": "tiny", "outcome": "completed"}
    assert counters.registry.get_sample_value("tapeout_requests_total", counted) == 100


async def test_nobody_else_does(app: Litestar) -> None:
    tenant = await add_tenant(app, "other")
    async with client(app) as http:
        assert (await http.get("/metrics")).status_code == 401
        refused = await http.get("/metrics", headers=tenant.bearer)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_only")


async def test_the_documentation_names_every_metric_and_no_other(app: Litestar) -> None:
    documented = set(re.findall(r"`(tapeout_\w+)`", DOCUMENT.read_text()))
    async with client(app) as http:
        text = (await http.get("/metrics", headers=OPERATOR)).text
    answered = set()
    for family in text_string_to_metric_families(text):
        answered.add(f"{family.name}_total" if family.type == "counter" else family.name)
    assert documented == answered
