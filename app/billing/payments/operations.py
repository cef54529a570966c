"""Operations: what is to be done at Stripe, planned in the transaction of what it serves.

Owns their rows and what a kind of operation consists of. Sending them is `outbox.py`'s.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Protocol

import msgspec
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.tables import StripeOperation
from app.billing.stripe import Stripe
from app.core import clock

OPEN_STATES = ("planned", "sent", "unknown")
MAX_ERROR_CHARS = 300
SEARCHED_BACK = timedelta(days=30)


class Operation(msgspec.Struct, frozen=True):
    """A row as a kind gets it. `id` is the idempotency key, and must be in the metadata (as
    `operation_key`) of whatever the operation makes and is found by."""

    id: str
    kind: str
    organization_id: str
    subject_id: str
    params: dict[str, Any]
    created_at: datetime

    @property
    def searched_from(self) -> datetime:
        """Since when Stripe is searched for what it made: from long before it was planned, by a
        clock that may have been ahead of Stripe's."""
        return min(self.created_at, clock.now()) - SEARCHED_BACK


class Answer(Protocol):
    """What Stripe made: one of the structs of `stripe_objects.py`."""

    @property
    def id(self) -> str: ...


class Refusal(msgspec.Struct, frozen=True):
    """Why something was not done: `message` for people, Stripe's words for programs."""

    message: str
    code: str = ""
    decline_code: str = ""
    payment_id: str = ""


class Kind:
    """A kind of operation. `send` and `find` run in a thread and may only speak with Stripe; the
    others run in a transaction that has locked the organization's account, and once per operation.

    `is_harmless_twice`: once a search proved that it did not happen, it is planned again under a
    new key. Any other waits for a person.
    """

    name: ClassVar[str]
    is_harmless_twice: ClassVar[bool] = False

    async def prepare(self, session: AsyncSession, operation: Operation) -> dict[str, Any] | None:
        """The parameters, fixed from now on, before it is first sent. None: what it needs is not
        there yet. Raises `NotNeeded`."""
        return operation.params

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        raise NotImplementedError

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        """What an earlier attempt made, by its metadata."""
        raise NotImplementedError

    async def confirmed(self, session: AsyncSession, operation: Operation, answer: Any) -> None:
        """Stripe did it, and said `answer`."""

    async def refused(self, session: AsyncSession, operation: Operation, why: Refusal) -> None:
        """It did not happen and will not."""

    async def doubted(self, session: AsyncSession, operation: Operation, reason: str) -> None:
        """Nobody knows whether it happened, and it is not tried again."""


class NotNeeded(Exception):
    """Raised by `prepare`: what the operation was for is over. The words say why."""


async def plan(
    session: AsyncSession,
    kind: str,
    key: str,
    organization_id: str,
    subject_id: str,
    params: dict[str, Any],
) -> None:
    """Has something done at Stripe, at most once for this key, if this transaction commits. The
    caller has locked the organization's account."""
    if await session.get(StripeOperation, key) is not None:
        return
    now = clock.now()
    session.add(
        StripeOperation(
            id=key,
            kind=kind,
            organization_id=organization_id,
            subject_id=subject_id,
            params=params,
            state="planned",
            next_at=now,
            created_at=now,
        )
    )
    await session.flush()


async def locked(session: AsyncSession, operation_id: str) -> StripeOperation:
    """The row as it is now, locked until the transaction ends."""
    rows = await session.scalars(
        select(StripeOperation)
        .where(StripeOperation.id == operation_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return rows.one()


async def due_ids(
    session: AsyncSession, now: datetime, organization_id: str | None, limit: int
) -> Sequence[tuple[str, str]]:
    """Organization and id of what is to be sent or asked about now, the oldest first. Found by
    state: the order of rows is not the order of commits, so that no position could be kept."""
    query = select(StripeOperation.organization_id, StripeOperation.id).where(
        StripeOperation.state.in_(OPEN_STATES), StripeOperation.next_at <= now
    )
    if organization_id is not None:
        query = query.where(StripeOperation.organization_id == organization_id)
    query = query.order_by(StripeOperation.created_at, StripeOperation.id).limit(limit)
    return [(row[0], row[1]) for row in await session.execute(query)]


async def open_operations(
    session: AsyncSession, organization_id: str, kind: str
) -> Sequence[StripeOperation]:
    """Those of a kind that may still happen."""
    rows = await session.scalars(
        select(StripeOperation).where(
            StripeOperation.organization_id == organization_id,
            StripeOperation.kind == kind,
            StripeOperation.state.in_(OPEN_STATES),
        )
    )
    return rows.all()


async def hasten(session: AsyncSession, organization_id: str) -> None:
    """Has what waits for something of this organization's looked at again at once."""
    await session.execute(
        update(StripeOperation)
        .where(
            StripeOperation.organization_id == organization_id, StripeOperation.state == "planned"
        )
        .values(next_at=clock.now())
        .execution_options(synchronize_session=False)
    )


def operation_of(row: StripeOperation) -> Operation:
    return Operation(
        row.id,
        row.kind,
        row.organization_id,
        row.subject_id,
        dict(row.params),
        row.created_at,
    )


def backoff_seconds(num_attempts: int, longest_seconds: int) -> int:
    """Twice as long after each attempt."""
    return min(longest_seconds, 2 ** min(num_attempts, 30))


def after_seconds(seconds: int) -> datetime:
    return clock.now() + timedelta(seconds=seconds)
