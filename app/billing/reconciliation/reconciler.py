"""Runs every comparison again and again, keeps what it found, and raises the alarm.

Owns the order of the checks and what they remember from run to run. Where numbers of other parts
of the box come from is the composition root's to say, as `Sources`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection

from app.billing.ledger import STRIPE_CLEARING
from app.billing.payments import notices
from app.billing.reconciliation.balances import check_balances, check_credit, check_lots
from app.billing.reconciliation.budgets import BUDGETS, BudgetWalk
from app.billing.reconciliation.check import Check
from app.billing.reconciliation.dialects import reading_engine, snapshot
from app.billing.reconciliation.engines import EngineState, check_engines
from app.billing.reconciliation.holds import check_holds, check_windows
from app.billing.reconciliation.hours import HourSums, check_hours
from app.billing.reconciliation.journal import JOURNAL, SETTLED, JournalState, JournalWalk
from app.billing.reconciliation.ledger import check_complete, check_zero
from app.billing.reconciliation.runs import Run, add_run, confirmed, latest_run, make_run, prune
from app.billing.reconciliation.seals import SealWalk
from app.billing.reconciliation.stripe_checks import INVOICES, SUBJECTS
from app.billing.reconciliation.stripe_walk import NOT_CONFIGURED, StripeWalk
from app.billing.reconciliation.sums import LedgerSums
from app.billing.reconciliation.usage import ORPHANS, UsageWalk
from app.billing.stripe import Stripe
from app.billing.usage_archive import UsageArchive, detail_from
from app.core import clock
from app.core.database import Database
from app.core.failpoints import failpoint

SECONDS = 60.0  # between runs
RECOUNT = timedelta(days=1)  # how often all of the ledger is added up anew
RECOUNT_AFTER_DIFFERENCE = timedelta(minutes=10)
CHEAP_SECONDS = 0.2  # a count of the whole ledger that takes no longer is part of every run
ENGINES_LATE_NS = 5 * 10**9
NOTICE = "books_differ"

log = logging.getLogger(__name__)


class Sources(NamedTuple):
    """What is not in the database."""

    journal: Callable[[], JournalState]
    engines: Callable[[], Sequence[EngineState]]


class Reconciler:
    """One per process. `organization_id` is the operator's, who gets the notices."""

    def __init__(
        self,
        database: Database,
        url: str,
        sources: Sources,
        *,
        organization_id: str,
        longest_request_ms: int,
        detail_days: int,
        archive: UsageArchive,
        public_key: str,
        stripe: Stripe | None = None,
        stripe_since: datetime | None = None,
    ) -> None:
        """`stripe_since`: before, this box had no payments at Stripe."""
        self._database = database
        self._engine = reading_engine(url)
        self._sources = sources
        self._organization_id = organization_id
        self._detail_days, self._archive = detail_days, archive
        self._longest_request_ms = longest_request_ms
        self._lock = asyncio.Lock()
        self._sums = LedgerSums()
        self._hours = HourSums()
        self._journal = JournalWalk()
        self._usage = UsageWalk()
        self._seals = SealWalk(self._engine, archive, public_key)
        self._stripe: StripeWalk | None = None
        if stripe is not None:
            self._stripe = StripeWalk(self._engine, stripe, stripe_since or clock.now())
        self._latest: Run | None = None
        self._budgets = BudgetWalk()
        self._recounted_at: float | None = None  # seconds of a clock that nobody sets
        self._complete: Check | None = None
        self._count_seconds = 0.0
        self._engines_before: Sequence[EngineState] = ()
        self._engines_at_ns = 0

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.dispose)

    async def latest(self) -> Run | None:
        """The last comparison, whatever the clock said of it; after a start, that which an earlier
        process stored."""
        if self._latest is not None:
            return self._latest
        async with self._database.read() as session:
            return await latest_run(session, clock.now())

    async def run(self) -> Run:
        """Compares everything once, one run at a time."""
        async with self._lock:
            return await self._run()

    async def _run(self) -> Run:
        started_at = clock.now()
        before = await self.latest()
        if self._latest is None and before is not None:
            self._go_on(before)
        journal, engines = self._sources.journal(), self._sources.engines()
        self._journal.add(journal.settled_ids)
        checks = await asyncio.to_thread(self._compare, journal, started_at)
        checks += self._compare_engines(engines)
        checks += await asyncio.to_thread(self._compare_stripe)
        checks = confirmed(checks, before.checks if before else [])
        run = make_run(started_at, clock.now(), checks, self._positions())
        await self._store(run)
        self._latest = run
        return run

    def _compare_engines(self, engines: Sequence[EngineState]) -> list[Check]:
        """With how they stood some seconds ago at least: what they say of themselves is late."""
        is_old = clock.monotonic_ns() - self._engines_at_ns >= ENGINES_LATE_NS
        checks = check_engines(engines, self._engines_before if is_old else ())
        if is_old:
            self._engines_before, self._engines_at_ns = engines, clock.monotonic_ns()
        return checks

    def _positions(self) -> dict[str, int]:
        seals = self._seals
        positions = {"usage": self._usage.until, "seals": seals.until, "old_seals": seals.old}
        return positions | (self._stripe.positions if self._stripe else {})

    def _go_on(self, before: Run) -> None:
        """Where an earlier process stopped, with what it had found and not confirmed yet."""
        found = {check.name: check.differences for check in before.checks}
        names = {check: [difference.name for difference in found[check]] for check in found}
        self._journal.add(d.name for d in found.get(JOURNAL.name, ()) if d.note == SETTLED)
        self._usage.orphans = names.get(ORPHANS.name, [])
        self._budgets.differing = names.get(BUDGETS.name, [])
        positions = before.positions
        self._usage.until = positions.get("usage", 0)
        self._seals.until = positions.get("seals", 0)
        self._seals.old = positions.get("old_seals", 0)
        if self._stripe is not None:
            self._stripe.go_on(positions)
            self._stripe.differing_invoices = names.get(INVOICES.name, [])

    # --- on a thread ----------------------------------------------------------------------

    def _compare(self, journal: JournalState, now: datetime) -> list[Check]:
        with snapshot(self._engine) as connection:
            checks = self._compare_sums(connection, now)
            is_clean = all(check.is_clean for check in checks)
            if self._recounts_after(RECOUNT if is_clean else RECOUNT_AFTER_DIFFERENCE):
                # What was added up before may have been changed since.
                checks = self._recount(connection, now)
            kept_from = detail_from(self._detail_days, self._archive.archived_until())
            usage, unbalanced = self._usage.check(connection, kept_from)
            totals, _ = self._sums.read(connection)
            if self._count_seconds < CHEAP_SECONDS:
                self._count(connection, now)
            assert self._complete is not None, "counted in the first run"
            checks = [
                self._journal.check(connection, journal, self._longest_request_ms),
                usage,
                self._usage.check_orphans(connection),
                check_zero(totals, unbalanced),
                self._complete,
                *checks,
                check_holds(connection),
                check_windows(connection),
                self._budgets.check(connection, now),
            ]
        return [*checks, self._seals.check()]

    def _compare_stripe(self) -> list[Check]:
        if self._stripe is None:
            return [subject.not_compared(NOT_CONFIGURED) for subject in SUBJECTS]
        return self._stripe.check(
            lambda connection: self._sums.read(connection)[0].by_account[STRIPE_CLEARING]
        )

    def _compare_sums(self, connection: Connection, now: datetime) -> list[Check]:
        totals, lot_uses = self._sums.read(connection)
        hours = self._hours.read(connection, int(now.timestamp()) // 3600)  # of whole seconds
        return [
            check_hours(hours, totals),
            check_balances(connection, totals),
            check_credit(connection, totals),
            check_lots(connection, lot_uses),
        ]

    def _recounts_after(self, wait: timedelta) -> bool:
        at = self._recounted_at
        return at is None or time.monotonic() - at >= wait.total_seconds()

    def _recount(self, connection: Connection, now: datetime) -> list[Check]:
        self._recounted_at = time.monotonic()
        self._count(connection, now)
        self._sums.reset()
        self._hours.reset()
        return self._compare_sums(connection, now)

    def _count(self, connection: Connection, now: datetime) -> None:
        started_seconds = time.monotonic()
        self._complete = check_complete(connection, now)
        self._count_seconds = time.monotonic() - started_seconds

    # --- what was found -------------------------------------------------------------------

    async def _store(self, run: Run) -> None:
        failpoint("reconciler.before_store")
        async with self._database.write() as session:
            add_run(session, run)
            await prune(session, run.started_at)
            for check in run.checks:
                if check.confirmed:
                    await notices.notify(
                        session,
                        self._organization_id,
                        NOTICE,
                        _words(check),
                        {"check": check.name, "run_id": run.id},
                        subject=check.name,
                    )
            clean = {check.name for check in run.checks if check.is_clean and not check.skipped}
            for notice in await notices.open_notices(session, self._organization_id, NOTICE):
                if notice.data.get("check") in clean:
                    subject = notice.data["check"]
                    await notices.end(session, self._organization_id, NOTICE, subject)
        failpoint("reconciler.after_store")
        for check in run.checks:
            for name in check.confirmed:
                log.error("the books differ: %s: %s", check.title, name)


def _words(check: Check) -> str:
    named = ", ".join(check.confirmed[:3])
    more = f" and {len(check.confirmed) - 3} more" if len(check.confirmed) > 3 else ""
    return (
        f"The books differ: {check.title}. Two comparisons in a row found it of {named}{more}. "
        "See the page Books."
    )
