"""`/api/reconciliation`: the last comparison of all the books, for the operator; and where its
numbers come from that are not in the database."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.datastructures import State
from litestar.params import FromQuery

from app.api.auth import bearer_principal
from app.api.relay import HOLD_SECONDS, LATE_SECONDS
from app.billing.payments.service import Payments
from app.billing.reconciliation.check import Check
from app.billing.reconciliation.engines import REST_NS, EngineCounts, EngineState
from app.billing.reconciliation.journal import JournalState
from app.billing.reconciliation.reconciler import Reconciler, Sources
from app.billing.reconciliation.runs import PastRun, Run, past_differences
from app.core.clock import monotonic_ns
from app.core.database import Database
from app.deployments.fleet import Fleet
from app.deployments.link import ReplicaLink
from app.deployments.metered import Counts
from app.deployments.replica import RunningReplica
from app.metering.journal import Journal
from app.organizations.service import default_organization_id
from app.organizations.tables import Organization
from app.settings import Settings

AnyRequest = Request[Any, Any, Any]
SETTLING_SECONDS = 60.0  # that a settlement may take beyond its request
MAX_PAST = 200


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison. `is_alarm`: a difference was found by two in a row. Numbers are nano-units
    of the currency where a check's `unit` is `nano`."""

    id: str
    started_at: datetime
    finished_at: datetime
    took_ms: int
    currency: str
    num_differences: int
    num_confirmed: int
    is_alarm: bool
    checks: list[Check]


class History(msgspec.Struct, frozen=True):
    """Comparisons that found differences, the newest first."""

    runs: list[PastRun]


class NoComparison(msgspec.Struct, frozen=True):
    """Before the first one is done."""

    checks: list[Check] = []


@get("/", summary="The last comparison of the books")
async def get_comparison(request: AnyRequest) -> Response[Comparison] | Response[NoComparison]:
    """Journal, requests, ledger, balances, engines and Stripe side by side. They are compared once
    a minute. Only the operator sees them."""
    await _operator(request)
    reconciler: Reconciler = request.app.state.reconciler
    run = await reconciler.latest()
    return Response(NoComparison()) if run is None else Response(_answer(request, run))


@post("/", summary="Compare the books now", status_code=200)
async def compare_now(request: AnyRequest) -> Response[Comparison]:
    """Does what is done once a minute, and answers when it is done."""
    await _operator(request)
    reconciler: Reconciler = request.app.state.reconciler
    return Response(_answer(request, await reconciler.run()))


@get("/history", summary="Past differences of the books")
async def get_history(request: AnyRequest, limit: FromQuery[int] = 50) -> Response[History]:
    """The last comparisons that found any, also those that only one found."""
    await _operator(request)
    database: Database = request.app.state.database
    async with database.read() as session:
        runs = await past_differences(session, min(max(limit, 1), MAX_PAST))
    return Response(History(runs))


async def _operator(request: AnyRequest) -> None:
    principal = await bearer_principal(request)
    principal.require_operator()


def _answer(request: AnyRequest, run: Run) -> Comparison:
    settings: Settings = request.app.state.settings
    return Comparison(
        id=run.id,
        started_at=run.started_at,
        finished_at=run.finished_at,
        took_ms=run.took_ms,
        currency=settings.currency,
        num_differences=run.num_differences,
        num_confirmed=run.num_confirmed,
        is_alarm=run.num_confirmed > 0,
        checks=run.checks,
    )


# --- where numbers come from ------------------------------------------------------------


async def make_reconciler(state: State, settings: Settings) -> Reconciler:
    """Over the parts of a box that has started."""
    database: Database = state.database
    journal: Journal = state.journal
    fleet: Fleet = state.fleet
    longest_seconds = (
        settings.request_timeout_seconds + LATE_SECONDS + HOLD_SECONDS + SETTLING_SECONDS
    )
    payments: Payments = state.payments
    async with database.read() as session:
        organization_id = await default_organization_id(session)
        organization = await session.get_one(Organization, organization_id)
    return Reconciler(
        database,
        settings.sync_database_url,
        Sources(lambda: journal_state(journal), lambda: engine_states(fleet.running())),
        organization_id=organization_id,
        longest_request_ms=round(longest_seconds * 1000),
        detail_days=settings.usage_detail_days,
        archive=state.records.archive,
        public_key=state.records.public_key,
        stripe=payments.link.stripe if payments.is_configured else None,
        stripe_since=organization.created_at,
    )


def journal_state(journal: Journal) -> JournalState:
    return JournalState(**journal.open_requests.take()._asdict())


def engine_states(replicas: Sequence[RunningReplica]) -> list[EngineState]:
    """Of the workers that answer now."""
    return [
        _engine_state(replica, replica.link)
        for replica in replicas
        if replica.link is not None and not replica.link.closed
    ]


def _engine_state(replica: RunningReplica, link: ReplicaLink) -> EngineState:
    stats, metered = link.stats, link.metered
    silent_ns = monotonic_ns() - metered.received_ns
    is_idle = stats.num_running == stats.num_waiting == link.num_outstanding == 0
    desired = replica.desired
    return EngineState(
        id=f"{replica.id} {metered.started_ns}",
        name=f"{desired.endpoint_name} v{desired.version_number} {replica.id}",
        engine=EngineCounts(
            stats.requests,
            stats.prompt_tokens,
            stats.cached_tokens,
            stats.output_tokens,
            stats.device_ns,
        ),
        delivered=_counts(metered.delivered),
        undelivered=_counts(metered.undelivered),
        num_failed=metered.num_failed,
        num_runs=stats.runs,
        is_resting=is_idle and silent_ns >= REST_NS,
    )


def _counts(counts: Counts) -> EngineCounts:
    return EngineCounts(*msgspec.structs.astuple(counts))


router = Router(
    "/api/reconciliation",
    route_handlers=[get_comparison, compare_now, get_history],
    tags=["Books"],
)
