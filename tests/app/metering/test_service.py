"""Usage added up by key, model, day and dimension, and receipts."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from app.billing.accounts import AccountWriter
from app.billing.rating import Settlement
from app.core.database import Database
from app.core.errors import NotFound
from app.metering.receipts import read_receipt
from app.metering.service import UsageRow, total_nano, usage_by
from tests.app.billing.conftest import ORGANIZATION, accounts, settlement

__all__ = ["accounts", "settlement"]  # fixtures

JANUARY = datetime(2026, 1, 1, tzinfo=UTC)
MARCH = datetime(2026, 3, 1, tzinfo=UTC)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 1_000_000_000


@pytest.fixture
async def month(accounts: AccountWriter, settlement: Callable[..., Settlement]) -> None:
    """Three requests of one organization over two days, one of another, one out of range."""
    late = at("2026-01-31T23:59:59+00:00")
    for settled in (
        settlement("req_1", 1_000, finished_at_ns=at("2026-01-30T00:00:00+00:00")),
        settlement("req_2", 2_000, finished_at_ns=late, endpoint_name="big", cached_tokens=7),
        settlement("req_3", 500, finished_at_ns=late, api_key_id="key_2", outcome="failed"),
        settlement("req_4", 500, finished_at_ns=late, organization_id="org_2"),
        settlement("req_5", 500, finished_at_ns=at("2026-03-01T00:00:00+00:00")),
    ):
        accounts.settle(settled)
    await accounts.flush()


@pytest.mark.usefixtures("month")
async def test_usage_by_group(database: Database) -> None:
    async with database.read() as session:

        async def by(group_by: str) -> list[UsageRow]:
            return await usage_by(session, ORGANIZATION, group_by, JANUARY, MARCH)  # type: ignore[arg-type]

        assert await by("model") == [
            UsageRow("big", 1, 100, 7, 2_000, 3, 810_170),
            UsageRow("tiny", 2, 200, 0, 1_500, 6, 410_100),
        ]
        assert await by("key") == [
            UsageRow("name of key_1", 2, 200, 7, 3_000, 6, 1_220_270),
            UsageRow("name of key_2", 1, 100, 0, 500, 3, 0),
        ]
        assert [(row.group, row.requests) for row in await by("day")] == [
            ("2026-01-30", 1),
            ("2026-01-31", 2),
        ]
        dimensions = {row.group: row for row in await by("dimension")}
        assert dimensions["output"] == UsageRow("output", 3, 0, 0, 3_500, 0, 1_200_000)
        assert dimensions["request"].requests == 3
        assert await total_nano(session, ORGANIZATION, JANUARY, MARCH) == 1_220_270
        assert await usage_by(session, "org_none", "day", JANUARY, MARCH) == []


@pytest.mark.usefixtures("month")
async def test_a_receipt_adds_up(database: Database) -> None:
    async with database.read() as session:
        receipt = await read_receipt(session, ORGANIZATION, "req_2")
    assert receipt.model == "big"
    assert [line.dimension for line in receipt.lines] == [
        "input",
        "cached_input",
        "output",
        "request",
        "device_ms",
    ]
    assert sum(line.amount_nano for line in receipt.lines) == receipt.amount_nano
    assert receipt.finished_at == datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)
    assert (receipt.duration_ns, receipt.first_token_ns) == (5_000_000, 1_000_000)


@pytest.mark.usefixtures("month")
async def test_another_organization_s_receipt_does_not_exist(database: Database) -> None:
    async with database.read() as session:
        with pytest.raises(NotFound):
            await read_receipt(session, ORGANIZATION, "req_4")
