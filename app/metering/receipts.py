"""One request's receipt, as its caller sees it. Reads the database only."""

from datetime import datetime

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import NotFound
from app.metering.tables import DIMENSIONS, UsageEvent, UsageLine


class ReceiptLine(msgspec.Struct, frozen=True):
    """quantity x price_nano / unit_scale = amount_nano, unless waived or free."""

    dimension: str
    quantity: int
    price_nano: int
    unit_scale: int
    amount_nano: int
    disposition: str


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What one request used and cost. Durations are nanoseconds."""

    request_id: str
    model: str
    version: int
    api_key_name: str
    route: str
    service_class: str
    outcome: str
    finish_reason: str
    currency: str
    amount_nano: int
    price_book_id: str
    started_at: datetime
    finished_at: datetime
    duration_ns: int
    first_token_ns: int | None
    lines: list[ReceiptLine]


async def read_receipt(session: AsyncSession, organization_id: str, request_id: str) -> Receipt:
    """Raises `NotFound` for unknown, unsettled and other organizations' requests alike."""
    event = await session.scalar(
        select(UsageEvent)
        .where(UsageEvent.request_id == request_id, UsageEvent.organization_id == organization_id)
        .order_by(UsageEvent.started_at.desc())
        .limit(1)
    )
    if event is None:
        raise NotFound(
            f"There is no receipt for {request_id!r}. It is named by the response header "
            "x-request-id and exists once the request has ended.",
            code="receipt_not_found",
        )
    lines = await session.scalars(select(UsageLine).where(UsageLine.event_id == event.id))
    return Receipt(
        request_id=event.request_id,
        model=event.endpoint_name,
        version=event.version_number,
        api_key_name=event.api_key_name,
        route=event.route,
        service_class=event.service_class,
        outcome=event.outcome,
        finish_reason=event.finish_reason,
        currency=event.currency,
        amount_nano=event.amount_nano,
        price_book_id=event.price_book_id,
        started_at=event.started_at,
        finished_at=event.finished_at,
        duration_ns=event.duration_ns,
        first_token_ns=event.first_token_ns,
        lines=[
            ReceiptLine(
                line.dimension,
                line.quantity,
                line.price_nano,
                line.unit_scale,
                line.amount_nano,
                line.disposition,
            )
            for line in sorted(lines, key=lambda line: DIMENSIONS.index(line.dimension))
        ],
    )
