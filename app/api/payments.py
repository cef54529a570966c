"""What the operator does about payments that went wrong, over HTTP: operations at Stripe that are
in doubt, and webhooks that could not be followed up."""

from datetime import datetime
from typing import Any, Literal

import msgspec
from litestar import Request, Router, get, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from sqlalchemy import select

from app.api.auth import allowed, authenticated, dependencies
from app.api.writing import writing
from app.billing.payments.inbox import revive
from app.billing.payments.service import Payments
from app.billing.payments.tables import StripeEvent, StripeOperation
from app.core.database import Database
from app.core.errors import NotFound
from app.organizations.principal import Principal

AnyRequest = Request[object, object, State]
MAX_LISTED = 200


class OperationState(msgspec.Struct, frozen=True, kw_only=True):
    """Something asked of Stripe. `subject_id` is the top-up or invoice that it is for, and `id`
    its idempotency key. `state`: planned, sent, unknown (it is being looked for), confirmed,
    rejected, or quarantined (in doubt: for a person)."""

    id: str
    kind: str
    organization_id: str
    subject_id: str
    state: str
    num_attempts: int
    first_sent_at: datetime | None
    next_at: datetime
    error: str
    created_at: datetime


class EventState(msgspec.Struct, frozen=True, kw_only=True):
    """A webhook. `state`: received, parked (to be tried again), or dead (given up)."""

    id: str
    type: str
    object_id: str
    state: str
    num_attempts: int
    next_at: datetime
    error: str
    received_at: datetime


class Unfinished(msgspec.Struct, frozen=True):
    """What is not done yet at Stripe, or was given up; empty when all is well."""

    operations: list[OperationState]
    events: list[EventState]


class Decision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`look`: see whether Stripe lists it by now. `abandon`: it did not happen and is not to."""

    action: Literal["look", "abandon"]


@get("/unfinished", guards=[allowed("admin")], summary="List unfinished payments (operator)")
async def list_unfinished(request: AnyRequest, principal: NamedDependency[Principal]) -> Unfinished:
    """Operations at Stripe and webhooks that are under way, in doubt or given up, oldest first."""
    principal.require_operator()
    database: Database = request.app.state.database
    ended = ("confirmed", "rejected")
    async with database.read() as session:
        operations = await session.scalars(
            select(StripeOperation)
            .where(StripeOperation.state.not_in(ended))
            .order_by(StripeOperation.created_at)
            .limit(MAX_LISTED)
        )
        events = await session.scalars(
            select(StripeEvent)
            .where(StripeEvent.state != "done")
            .order_by(StripeEvent.received_at)
            .limit(MAX_LISTED)
        )
        return Unfinished([_operation(row) for row in operations], [_event(row) for row in events])


@post(
    "/operations/{operation_id:str}",
    guards=[allowed("admin")],
    status_code=200,
    summary="Decide a payment in doubt (operator)",
)
async def decide_operation(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    operation_id: FromPath[str],
    data: JSONBody[Decision],
) -> OperationState:
    """For what Stripe was asked without ever answering. Look at Stripe's dashboard before you
    abandon it: what did happen there is credited all the same once Stripe tells of it."""
    principal.require_operator()
    outbox = _payments(request).link.outbox
    decide = outbox.look_again if data.action == "look" else outbox.abandon
    transaction = writing(request, principal, "admin", operator=True)
    return _operation(await decide(transaction, operation_id))


@post(
    "/events/{event_id:str}",
    guards=[allowed("admin")],
    status_code=200,
    summary="Follow up a dead webhook again (operator)",
)
async def revive_event(
    request: AnyRequest, principal: NamedDependency[Principal], event_id: FromPath[str]
) -> EventState:
    """Once what it failed on is repaired."""
    principal.require_operator()
    inbox = _payments(request).link.inbox
    database: Database = request.app.state.database
    async with writing(request, principal, "admin", operator=True) as session:
        if not await revive(session, event_id):
            raise NotFound(f"There is no dead event {event_id!r}.", code="event_not_found")
    await inbox.turn()
    async with database.read() as session:
        return _event(await session.get_one(StripeEvent, event_id))


def _operation(row: StripeOperation) -> OperationState:
    return OperationState(**{name: getattr(row, name) for name in OperationState.__struct_fields__})


def _event(row: StripeEvent) -> EventState:
    return EventState(**{name: getattr(row, name) for name in EventState.__struct_fields__})


def _payments(request: AnyRequest) -> Payments:
    payments: Any = request.app.state.payments
    return payments


router = Router(
    "/api/payments",
    route_handlers=[list_unfinished, decide_operation, revive_event],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Billing"],
)
