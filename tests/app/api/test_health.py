"""`/readyz` says what keeps the box from serving, also when a thread has ended by itself."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app.billing import accounts
from app.metering import journal
from tests.app.api.conftest import Box

COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 5}


async def readiness(box: Box) -> tuple[int, str]:
    async with box.http() as http:
        response = await http.get("/readyz")
    return response.status_code, response.json()["status"]


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("nobody foresaw this")


async def test_a_box_that_can_serve_is_ready(box: Box) -> None:
    assert await readiness(box) == (200, "ready")
    async with box.http() as http:
        assert (await http.get("/healthz")).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("part", "method", "name", "code"),
    [
        (journal._Writer, "_append", "journal", "journal_unavailable"),
        (accounts._Writer, "_collect", "account writer", "accounts_unavailable"),
    ],
)
async def test_a_thread_that_ended_is_named_and_nobody_waits_for_it(
    box: Box,
    monkeypatch: pytest.MonkeyPatch,
    part: type,
    method: str,
    name: str,
    code: str,
) -> None:
    monkeypatch.setattr(part, method, fail)
    async with box.http() as http:
        # The first one still finds the thread at work.
        answers = [await http.post("/v1/completions", json=COMPLETION) for _ in range(3)]
    assert [answer.status_code for answer in answers[1:]] == [503, 503]
    assert [answer.json()["error"]["code"] for answer in answers[1:]] == [code, code]
    status, reason = await readiness(box)
    assert status == 503
    assert name in reason


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda box: box.claim.release(), "claim"),
        (lambda box: setattr(box.database, "read", fail_to_read), "database"),
    ],
)
async def test_a_lost_database_is_named(
    box: Box, break_it: Callable[[Box], None], word: str
) -> None:
    break_it(box)
    status, reason = await readiness(box)
    assert status == 503
    assert word in reason


def fail_to_read() -> Any:
    raise OperationalError("SELECT 1", {}, OSError("gone"))
