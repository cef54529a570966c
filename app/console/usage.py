"""The page Usage with its files, the list of requests, and one request's receipt."""

import re
from datetime import datetime
from typing import Any

import msgspec
from litestar import Response, Router, get
from litestar.params import FromPath, FromQuery
from litestar.response import Stream

from app.billing.records import Records
from app.console.sessions import signed_in
from app.console.templating import PageRequest, page
from app.console.usage_csv import requests_file, sums_file
from app.console.usage_query import PERIODS, SPLITS, read_query
from app.console.usage_view import (
    DIMENSION_NAMES,
    NUM_ROWS,
    read_cells_of,
    read_usage_view,
    spend_chart,
)
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest, NotFound
from app.deployments.serving_notes import serving_note
from app.metering.requests import Place, RequestFilter, read_requests
from app.metering.service import GroupBy
from app.settings import Settings

PAGE_REQUESTS = 100


@get("/usage")
async def show_usage(request: PageRequest) -> Response[str]:
    """What was used, what it cost, and what caching saved."""
    principal = signed_in(request).principal
    principal.require("read")
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    query = read_query(request.query_params)
    async with database.read() as session:
        view = await read_usage_view(session, principal.organization_id, query, settings.currency)
    return page(
        request,
        "usage/usage.html",
        view=view,
        query=query,
        chart=spend_chart(view),
        periods=PERIODS,
        splits=SPLITS,
        num_rows=NUM_ROWS,
    )


@get("/usage.csv")
async def download_usage(request: PageRequest, by: FromQuery[GroupBy] = "day") -> Stream:
    """One of the page's tables; hours have none."""
    principal = signed_in(request).principal
    principal.require("read")
    if by == "hour":
        raise InvalidRequest("Sums by hour are at /api/usage.csv?group_by=hour.", param="by")
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    query = read_query(request.query_params)
    async with database.read() as session:
        _, shown = await read_cells_of(session, principal.organization_id, query)
    return sums_file(query, shown, by, settings.currency)


@get("/requests")
async def show_requests(
    request: PageRequest, before: FromQuery[str] = "", id: FromQuery[str] = ""
) -> Response[Any]:
    """Single requests, newest first; `before` and `id` are where the page before ended."""
    principal = signed_in(request).principal
    principal.require("read")
    database: Database = request.app.state.database
    query = read_query(request.query_params)
    wanted = RequestFilter(
        start=query.start,
        end=query.end,
        api_key_id=query.key_id,
        endpoint_name=query.endpoint_name,
    )
    place = Place(_instant(before), id) if before else None
    async with database.read() as session:
        events = await read_requests(
            session, principal.organization_id, wanted, PAGE_REQUESTS, place
        )
    older = ""
    if len(events) == PAGE_REQUESTS:
        last = events[-1]
        older = query.address("/console/requests", before=last.finished_at.isoformat(), id=last.id)
    return page(request, "usage/requests.html", query=query, events=events, older=older)


@get("/requests.csv")
async def download_requests(request: PageRequest) -> Stream:
    """Every request of the period, as it is read."""
    principal = signed_in(request).principal
    principal.require("read")
    query = read_query(request.query_params)
    return requests_file(request.app.state.database, principal.organization_id, query)


@get("/receipts/{request_id:str}")
async def show_receipt(request: PageRequest, request_id: FromPath[str]) -> Response[str]:
    """What one request used, at which prices."""
    principal = signed_in(request).principal
    principal.require("read")
    database: Database = request.app.state.database
    records: Records = request.app.state.records
    async with database.read() as session:
        receipt = await records.receipt(session, principal.organization_id, request_id)
        note = await serving_note(session, receipt.model, receipt.version)
    return page(
        request,
        "receipts/receipt.html",
        receipt=receipt,
        note=note,
        dimensions=DIMENSION_NAMES,
        proof=await records.proof(principal.organization_id, request_id),
    )


@get("/receipts/{request_id:str}/proof")
async def download_proof(request: PageRequest, request_id: FromPath[str]) -> Response[bytes]:
    """The file that `tapeout receipt verify` takes."""
    principal = signed_in(request).principal
    principal.require("read")
    records: Records = request.app.state.records
    proof = await records.proof(principal.organization_id, request_id)
    if proof is None:
        raise NotFound(f"The receipt of {request_id!r} is not sealed yet.", code="not_sealed")
    name = re.sub(r"[^A-Za-z0-9_-]", "_", request_id)
    return Response(
        msgspec.json.encode(proof),
        media_type="application/json",
        headers={"Content-Disposition": f'attachment; filename="receipt-{name}.json"'},
    )


def _instant(text: str) -> datetime:
    try:
        return clock.in_utc(datetime.fromisoformat(text))
    except ValueError:
        raise InvalidRequest("This page of requests does not exist.", param="before") from None


router = Router(
    "",
    route_handlers=[
        show_usage,
        download_usage,
        show_requests,
        download_requests,
        show_receipt,
        download_proof,
    ],
)
