"""Whether the clock can be trusted so far as to close a month by it, which nothing undoes.

Owns the last instant the box saw, kept across restarts. A clock that is further ahead of it is
wrong, or the box was off for long; only a person can tell which.
"""

from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments import mirror
from app.billing.payments.notices import end, notify
from app.billing.tables import LedgerTransaction
from app.core import clock
from app.core.errors import Conflict, InvalidRequest
from app.organizations.service import default_organization_id

ROW_ID = "clock:months"
MAX_LEAP = timedelta(days=35)  # what a clock may be ahead of the last instant seen
MAX_ERROR = timedelta(hours=1)  # of the box's clock, against that of who confirms it
RECORD_EVERY = timedelta(hours=1)
ALARM = "clock_leapt"


async def is_steady(session: AsyncSession) -> bool:
    """Whether the clock is at most `MAX_LEAP` ahead of the last instant seen, which then becomes
    this one. If not, the operator is told, and nothing changes until `confirm`, or until the clock
    is right again."""
    now = clock.now()
    row = await mirror.read(session, ROW_ID)
    if row is None:
        seen_at, is_alarmed = await _first_seen(session), False
    else:
        seen_at, is_alarmed = datetime.fromisoformat(row.data["seen_at"]), row.data["is_alarmed"]
    if now - seen_at > MAX_LEAP:
        await _tell(session, seen_at, now)
        await _record(session, seen_at, is_alarmed=True)
        return False
    if is_alarmed:
        await end(session, await default_organization_id(session), ALARM)
    if row is None or is_alarmed or now - seen_at >= RECORD_EVERY:
        await _record(session, now, is_alarmed=False)
    return True


async def waits_since(session: AsyncSession) -> datetime | None:
    """The last instant seen before the clock leapt, while nobody has confirmed the time; else
    None."""
    row = await mirror.read(session, ROW_ID)
    if row is None or not row.data["is_alarmed"]:
        return None
    return datetime.fromisoformat(row.data["seen_at"])


async def confirm(session: AsyncSession, told: datetime) -> None:
    """A person says what time it is: if the box's clock says the same, it is right. Raises
    `InvalidRequest`, `Conflict`."""
    try:
        told = clock.in_utc(told)
    except ValueError as error:
        raise InvalidRequest(f"now {error}.", param="now") from None
    now = clock.now()
    if abs(now - told) > MAX_ERROR:
        raise Conflict(
            f"The clock of this box says {now:%Y-%m-%d %H:%M} UTC, not {told:%Y-%m-%d %H:%M}. Set "
            "it right first.",
            code="clock_is_wrong",
        )
    await end(session, await default_organization_id(session), ALARM)
    await _record(session, now, is_alarmed=False)


async def _first_seen(session: AsyncSession) -> datetime:
    """Before anything was recorded: when the newest posting was made."""
    newest = await session.scalar(select(func.max(LedgerTransaction.created_at)))
    return newest or clock.now()


async def _record(session: AsyncSession, seen_at: datetime, *, is_alarmed: bool) -> None:
    data = {"seen_at": seen_at.isoformat(), "is_alarmed": is_alarmed}
    await mirror.put(session, ROW_ID, "cursor", data)


async def _tell(session: AsyncSession, seen_at: datetime, now: datetime) -> None:
    await notify(
        session,
        await default_organization_id(session),
        ALARM,
        f"The clock says {now:%Y-%m-%d %H:%M} UTC, but the box last ran at {seen_at:%Y-%m-%d}. "
        "No month is closed until somebody confirms the time, on the page Books or by POST "
        '/api/invoices/clock with {"now": "..."}. If the clock is wrong, set it right, and this '
        "ends by itself.",
        {"seen_at": seen_at.isoformat()},
    )
