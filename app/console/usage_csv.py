"""Usage as files for spreadsheets: the sums that a page shows, and single requests, which are
read and sent page after page, however many there are."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

from litestar.response import Stream

from app.console.usage_query import UsageQuery
from app.core.csv_text import Value, csv_blocks
from app.core.database import Database
from app.core.money import write_amount
from app.metering.requests import Place, RequestFilter, quantities_of, read_requests
from app.metering.service import COUNTED, GroupBy, UsageCells
from app.metering.tables import UsageEvent

PAGE_ROWS = 500
REQUEST_COLUMNS = (
    *("request_id", "started_at", "finished_at", "model", "version", "key", "key_id", "route"),
    *("class", "outcome", "finish_reason", "duration_ms", *COUNTED, "amount", "currency"),
    "price_book_id",
)


def sums_file(query: UsageQuery, shown: UsageCells, group_by: GroupBy, currency: str) -> Stream:
    """One table of the page Usage."""
    header = [group_by, "requests", *COUNTED, "amount", "currency"]
    counts = (
        (
            *(row.group, row.requests),
            *(getattr(row, name) for name in COUNTED),
            *(write_amount(row.amount_nano), currency),
        )
        for row in shown.rows(group_by)
    )
    return csv_file(_name("usage-by-" + group_by, query), csv_blocks(header, counts))


def requests_file(database: Database, organization_id: str, query: UsageQuery) -> Stream:
    """Every request of the period, newest first."""
    wanted = RequestFilter(
        start=query.start,
        end=query.end,
        api_key_id=query.key_id,
        endpoint_name=query.endpoint_name,
    )
    return csv_file(_name("requests", query), _request_blocks(database, organization_id, wanted))


def csv_file(name: str, blocks: Iterator[bytes] | AsyncIterator[bytes]) -> Stream:
    """A download of this name."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.csv"'}
    return Stream(blocks, media_type="text/csv", headers=headers)


def _name(subject: str, query: UsageQuery) -> str:
    return f"{subject}-{query.first:%Y%m%d}-{query.last:%Y%m%d}"


async def _request_blocks(
    database: Database, organization_id: str, wanted: RequestFilter
) -> AsyncIterator[bytes]:
    """No transaction stays open while a slow reader takes a block."""
    place: Place | None = None
    header: Any = REQUEST_COLUMNS
    while True:
        async with database.read() as session:
            events = await read_requests(session, organization_id, wanted, PAGE_ROWS, place)
            used = await quantities_of(session, events)
        for block in csv_blocks(header, [_request(event, used[event.id]) for event in events]):
            yield block
        if len(events) < PAGE_ROWS:
            return
        place = Place(events[-1].finished_at, events[-1].id)
        header = ()


def _request(event: UsageEvent, used: dict[str, int]) -> list[Value]:
    return [
        *(event.request_id, event.started_at.isoformat(), event.finished_at.isoformat()),
        *(event.endpoint_name, event.version_number, event.api_key_name, event.api_key_id),
        *(event.route, event.service_class, event.outcome, event.finish_reason),
        event.duration_ns // 1_000_000,
        *(used.get(name, 0) for name in COUNTED),
        *(write_amount(event.amount_nano), event.currency, event.price_book_id),
    ]
