"""The inbox: what Stripe tells us by webhook, stored as it came, then followed up.

Owns the rows of events, when they are tried again, and finding those that never came. What an
event means is decided by `following.py`, from the object as it is at Stripe by then.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

import msgspec
from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments import following, mirror
from app.billing.payments.calls import Calls
from app.billing.payments.following import EVENT_TYPES
from app.billing.payments.notices import alarm
from app.billing.payments.operations import MAX_ERROR_CHARS, after_seconds, backoff_seconds
from app.billing.payments.tables import StripeEvent, StripeOperation
from app.billing.stripe import Stripe
from app.billing.stripe_errors import StripeBusy, StripeUnknown
from app.billing.stripe_events import parse_event
from app.billing.stripe_lists import EVENT_LIFETIME
from app.billing.stripe_objects import Event, read_event
from app.core import clock
from app.core.database import Database, upsert
from app.core.failpoints import failpoint

WAITING_STATES = ("received", "parked")
MAX_DUE = 100  # taken up at once
NUM_AT_ONCE = 4
LEASE_SECONDS = 300  # longer than reading an object takes
AWAY_SECONDS = 30  # until Stripe is tried again, when it did not answer
LONGEST_WAIT_SECONDS = 3600
MAX_ATTEMPTS = 12
# Stripe may list an event later than its time says.
OVERLAP = timedelta(hours=1)
WAITED_FOR = timedelta(days=7)  # an object that Stripe does not know
KEPT_FOR = 3 * EVENT_LIFETIME
CURSOR_ID = "backfill"

FollowInvoice = Callable[[str], Awaitable[object]]

log = logging.getLogger(__name__)


class Inbox:
    """One per process; several may run on one database. `follow_invoice` reads an invoice of
    Stripe's again, by its id there, and brings it into the books."""

    def __init__(
        self, database: Database, stripe: Stripe, calls: Calls, follow_invoice: FollowInvoice
    ) -> None:
        self._database = database
        self._stripe = stripe
        self._calls = calls
        self._follow_invoice = follow_invoice

    async def resume(self) -> None:
        """What an earlier process was at is due at once."""
        async with self._database.write() as session:
            await session.execute(
                update(StripeEvent)
                .where(StripeEvent.state.in_(WAITING_STATES))
                .values(next_at=clock.now())
            )

    async def receive(self, body: bytes, header: str, secrets: Sequence[str]) -> str:
        """Stores a webhook, once, and returns its event's id. Raises `BadSignature`."""
        event = parse_event(body, header, secrets, clock.now())
        async with self._database.write() as session:
            await store(session, event, body)
            failpoint("inbox.before_store_commit")
        failpoint("inbox.after_store_commit")
        return event.id

    async def turn(self) -> None:
        """Follows up what waits, the oldest first."""
        tried: set[str] = set()
        while True:
            due = [id for id in await self._due() if id not in tried]
            if not due:
                return
            tried.update(due)
            for start in range(0, len(due), NUM_AT_ONCE):
                batch = due[start : start + NUM_AT_ONCE]
                await asyncio.gather(*(self._follow_up(event_id) for event_id in batch))

    async def backfill(self) -> int:
        """Stores what Stripe lists and no webhook brought. Returns how many that were."""
        started_at = clock.now()
        async with self._database.read() as session:
            until = await self._until(session, started_at)
        since = max(until - OVERLAP, started_at - EVENT_LIFETIME)
        num_stored = 0
        # Stripe takes twenty types at once.
        for types in EVENT_TYPES:
            events = await self._calls(self._listed, since, types)
            # By Stripe's clock, as ours may be ahead.
            until = max([until, *(min(event.created_at, started_at) for event in events)])
            for start in range(0, len(events), MAX_DUE):
                async with self._database.write() as session:
                    for event in events[start : start + MAX_DUE]:
                        num_stored += await store(session, event, msgspec.json.encode(event))
        async with self._database.write() as session:
            await _forget_old(session, started_at)
            await mirror.put(session, CURSOR_ID, "cursor", {"until": until.isoformat()})
            failpoint("inbox.before_backfill_commit")
        return num_stored

    def _listed(self, since: datetime, types: Sequence[str]) -> list[Event]:
        return list(self._stripe.list_events(since, types=types))

    async def _until(self, session: AsyncSession, now: datetime) -> datetime:
        """The newest event that was listed so far; at first, when Stripe was first asked for
        anything. Not the newest event that came: one may be missing before it."""
        cursor = await mirror.read(session, CURSOR_ID)
        if cursor is None:
            until = await session.scalar(select(func.min(StripeOperation.created_at))) or now
        else:
            until = datetime.fromisoformat(cursor.data["until"])
        # In the future, it is of a clock that was ahead.
        return until if until <= now else now - EVENT_LIFETIME

    async def _due(self) -> Sequence[str]:
        async with self._database.read() as session:
            rows = await session.scalars(
                select(StripeEvent.id)
                .where(StripeEvent.state.in_(WAITING_STATES), StripeEvent.next_at <= clock.now())
                .order_by(StripeEvent.received_at, StripeEvent.id)
                .limit(MAX_DUE)
            )
            return rows.all()

    async def _follow_up(self, event_id: str) -> None:
        event = await self._claim(event_id)
        failpoint("inbox.after_claim_commit")
        if event is None:
            return
        try:
            found = await self._calls(following.read, self._stripe, event)
            failpoint("inbox.after_read")
            if event.object_kind == "invoice":
                await self._follow_invoice(event.object_id)
            async with self._database.write() as session:
                await following.apply(session, event, found)
                await _done(session, event_id)
                failpoint("inbox.before_apply_commit")
            failpoint("inbox.after_apply_commit")
        except following.NotThere as error:
            await self._wait_for(event_id, str(error))
        except (StripeBusy, StripeUnknown) as error:
            await self._park(event_id, str(error), is_away=True)
        except Exception as error:
            log.exception("event %s (%s) could not be followed up", event_id, event.type)
            await self._park(event_id, repr(error), is_away=False)

    async def _claim(self, event_id: str) -> Event | None:
        async with self._database.write() as session:
            row = await _locked(session, event_id)
            if row.state not in WAITING_STATES or row.next_at > clock.now():
                return None
            row.num_attempts += 1
            row.next_at = after_seconds(LEASE_SECONDS)
            failpoint("inbox.before_claim_commit")
            return _event_of(row)

    async def _wait_for(self, event_id: str, reason: str) -> None:
        """What Stripe does not know may be there once the API key is the right one. After some
        days it is none of ours, unless the event itself says so: then a person is told."""
        async with self._database.write() as session:
            row = await _locked(session, event_id)
            if row.state not in WAITING_STATES:
                return
            row.error = reason[:MAX_ERROR_CHARS]
            row.state = "parked"
            row.next_at = after_seconds(backoff_seconds(row.num_attempts, LONGEST_WAIT_SECONDS))
            if clock.now() - row.received_at <= WAITED_FOR:
                return
            if await following.names_ours(session, _event_of(row)):
                row.state = "dead"
                await _raise_alarm(session, row)
            else:
                row.state = "done"

    async def _park(self, event_id: str, reason: str, *, is_away: bool) -> None:
        async with self._database.write() as session:
            row = await _locked(session, event_id)
            if row.state not in WAITING_STATES:
                return
            row.error = reason[:MAX_ERROR_CHARS]
            if is_away:  # not the event's fault
                row.num_attempts -= 1
                row.state, row.next_at = "parked", after_seconds(AWAY_SECONDS)
            elif row.num_attempts < MAX_ATTEMPTS:
                wait_seconds = backoff_seconds(row.num_attempts, LONGEST_WAIT_SECONDS)
                row.state, row.next_at = "parked", after_seconds(wait_seconds)
            else:
                row.state = "dead"
                await _raise_alarm(session, row)


async def store(session: AsyncSession, event: Event, raw: bytes) -> int:
    """Keeps an event to be followed up. Returns 0 for one that is there already."""
    connection = await session.connection()
    now = clock.now()
    statement = upsert(connection.dialect.name, StripeEvent).values(
        id=event.id,
        type=event.type[:80],
        object_id=event.object_id,
        raw=raw,
        state="received",
        num_attempts=0,
        next_at=now,
        error="",
        received_at=now,
    )
    result = await session.scalars(statement.on_conflict_do_nothing().returning(StripeEvent.id))
    return len(result.all())


async def _forget_old(session: AsyncSession, now: datetime) -> None:
    """What is done and so old that Stripe neither sends nor lists it any more."""
    await session.execute(
        delete(StripeEvent).where(
            StripeEvent.state == "done", StripeEvent.received_at < now - KEPT_FOR
        )
    )


async def revive(session: AsyncSession, event_id: str) -> bool:
    """Has a dead event tried again, once its cause is removed. Whether there was one."""
    row = await session.get(StripeEvent, event_id)
    if row is None or row.state != "dead":
        return False
    row.state, row.num_attempts, row.next_at = "received", 0, clock.now()
    return True


async def _locked(session: AsyncSession, event_id: str) -> StripeEvent:
    rows = await session.scalars(
        select(StripeEvent)
        .where(StripeEvent.id == event_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return rows.one()


async def _done(session: AsyncSession, event_id: str) -> None:
    row = await _locked(session, event_id)
    row.state, row.error = "done", ""


def _event_of(row: StripeEvent) -> Event:
    """Of a webhook's body, or of what the list of events gave us."""
    data = json.loads(row.raw)
    return read_event(data) if data.get("object") == "event" else msgspec.convert(data, Event)


async def _raise_alarm(session: AsyncSession, row: StripeEvent) -> None:
    await alarm(
        session,
        "webhook_dead",
        f"What Stripe told in event {row.id} ({row.type}) could not be followed up: {row.error}",
        {"event_id": row.id, "type": row.type},
        subject=row.id,
    )
