"""Random histories of money over the real code and a real database, checked after every step.

Two judges: `invariants.py` reads the tables alone, `model.py` says what they should hold.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing import budgets, credits, holds, posting
from app.billing.ledger import PROMOTIONAL_COST, STRIPE_CLEARING
from app.billing.payments.expiry import expire_credit
from app.billing.payments.invoices import MonthCloser
from app.billing.price_changes import change_prices
from app.billing.prices import Item, PriceTable, Rates
from app.billing.rating import Settlement, decoder_worst_case, rate
from app.billing.sealing import seal_all
from app.billing.service import set_spending_limit
from app.billing.signing import SigningKey, open_key
from app.core import clock
from app.core.database import Database, create_writer_engine
from app.core.errors import Conflict
from app.core.migration import upgrade
from app.metering.journal import Journal, read_unsettled
from app.metering.records import AdmitRecord, FinishRecord, Tally, Usage, use_of
from runtime.protocol import FinishReason, SequenceOutput
from tests.evidence import model
from tests.evidence.invariants import problems

ORGANIZATIONS = ("org_a", "org_b", "org_c")
KEYS = ("key_1", "key_2")
ENDPOINTS = ("tiny", "large")
START = datetime(2026, 11, 23, 12, tzinfo=UTC)

organizations = st.sampled_from(ORGANIZATIONS)
small = st.integers(0, 20)
amounts = st.integers(1, 3_000)


class Running:
    """One request on its way, as its caller and its journal see it."""

    def __init__(self, admitted: AdmitRecord, rates: Rates) -> None:
        self.tally = Tally(admitted)
        self.rates = rates
        self.delivered = 0


class Money(RuleBasedStateMachine):
    """One box with three organizations."""

    template: ClassVar[Path]
    set_clock: ClassVar[Callable[[datetime], None]]

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(dir=self.template.parent))
        path = self.directory / "books.db"
        shutil.copy(self.template, path)
        self.loop = asyncio.new_event_loop()
        self.engine = create_writer_engine(f"sqlite:///{path}")
        self.database = Database(f"sqlite+aiosqlite:///{path}")
        self.now = START
        self.set_clock(self.now)
        self.accounts: dict[str, model.Account] = {}
        self.running: dict[str, Running] = {}
        self.pending: dict[str, Settlement] = {}
        self.delivered: dict[str, int] = {}  # tokens, of every request that ever ran
        self.num_made = 0
        self.prices = PriceTable(self.database)
        self.do(self.prices.start())
        self.key: SigningKey = open_key(self.directory / "key.pem")
        self.closer = MonthCloser(self.database, "usd", has_stripe=False)
        self._open_journal(0)

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def write(self, work: Callable[[AsyncSession], Any]) -> Any:
        async def transaction() -> Any:
            async with self.database.write() as session:
                return await work(session)

        return self.do(transaction())

    def _open_journal(self, number: int) -> list[Usage]:
        directory = self.directory / f"journal{number}"
        directory.mkdir(exist_ok=True)
        self.journal_number = number
        self.journal = Journal(directory, segment_bytes=2_000)
        return self.do(self.journal.start())

    def teardown(self) -> None:
        self.do(self.journal.close())
        self.do(self.prices.close())
        self.do(self.database.close())
        self.engine.dispose()
        self.do(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.directory)

    def account(self, name: str) -> model.Account:
        return self.accounts.setdefault(name, model.Account())

    def name(self, prefix: str) -> str:
        self.num_made += 1
        return f"{prefix}_{self.num_made}"

    @initialize(limits=st.tuples(*[st.sampled_from([None, 0, 5_000])] * 3))
    def begin(self, limits: tuple[int | None, ...]) -> None:
        for name, limit in zip(ORGANIZATIONS, limits, strict=True):
            self._set_limit(name, limit)

    # --- requests -------------------------------------------------------------------------

    @rule(
        organization=organizations,
        key=st.sampled_from(KEYS),
        endpoint=st.sampled_from(ENDPOINTS),
        num_prompt_tokens=small,
        max_tokens=st.integers(1, 20),
        num_choices=st.integers(1, 2),
    )
    def admit(
        self,
        organization: str,
        key: str,
        endpoint: str,
        num_prompt_tokens: int,
        max_tokens: int,
        num_choices: int,
    ) -> None:
        request_id = self.name("req")
        started_at_ns = int(self.now.timestamp()) * 10**9
        rates = self.prices.rates(endpoint, "standard", num_prompt_tokens, started_at_ns)
        amount = decoder_worst_case(rates, num_prompt_tokens, max_tokens, num_choices)
        wanted = holds.HoldRequest(request_id, organization, amount, key, endpoint)
        with self.engine.begin() as connection:
            refused = holds.take_holds(connection, [wanted], self.journal.id, "usd")
        why = self.account(organization).hold(request_id, amount, key, endpoint, self.now)
        assert bool(refused) == bool(why), (refused, why)
        if why:
            return
        record = AdmitRecord(
            request_id=request_id,
            organization_id=organization,
            api_key_id=key,
            api_key_name=f"name of {key}",
            endpoint_name=endpoint,
            version_number=1,
            route="/v1/completions",
            kind="decoder",
            service_class="standard",
            price_book_id=rates.book_id,
            started_at_ns=started_at_ns,
            num_prompt_tokens=num_prompt_tokens,
            num_choices=num_choices,
        )
        self.journal.admit(record)
        self.running[request_id] = Running(record, rates)
        self.running[request_id].tokens_left = [max_tokens] * num_choices  # type: ignore[attr-defined]

    def _pick(self, at: int) -> str:
        return sorted(self.running)[at % len(self.running)]

    @precondition(lambda self: self.running)
    @rule(
        at=small,
        choice=st.integers(0, 1),
        num_tokens=st.integers(0, 6),
        num_cached=st.integers(0, 25),
        reason=st.sampled_from([None, None, "stop", "length", "abort", "error"]),
    )
    def step(
        self, at: int, choice: int, num_tokens: int, num_cached: int, reason: FinishReason | None
    ) -> None:
        """A step of one sequence is durable, then delivered; the last one queues its settlement."""
        request_id = self._pick(at)
        running = self.running[request_id]
        choice %= running.tally.admitted.num_choices
        if choice in running.tally.finish_reasons:
            return
        left: list[int] = running.tokens_left  # type: ignore[attr-defined]
        num_tokens = min(num_tokens, left[choice])
        left[choice] -= num_tokens
        output = SequenceOutput(
            request_id=request_id,
            choice=choice,
            token_ids=[1] * num_tokens,
            text="",
            num_cached_tokens=num_cached,
            device_ns=1_000,
            finish_reason=reason,
        )
        self.do(self.journal.commit_step([output]))
        running.tally.add(use_of(output), int(self.now.timestamp()) * 10**9)
        running.delivered += num_tokens
        self.delivered[request_id] = running.delivered
        if running.tally.is_finished:
            self._end(request_id, *running.tally.outcome())

    @precondition(lambda self: self.running)
    @rule(at=small)
    def fail(self, at: int) -> None:
        """By our fault, which only the journal's end record tells."""
        request_id = self._pick(at)
        self.journal.note_finish(FinishRecord(request_id, 1, "failed", "internal_error"))
        self._end(request_id, "failed", "internal_error")

    def _end(self, request_id: str, outcome: Any, reason: str) -> None:
        running = self.running.pop(request_id)
        usage = running.tally.usage(outcome, reason, int(self.now.timestamp()) * 10**9)
        self.pending[request_id] = rate(usage, running.rates)

    @precondition(lambda self: self.running)
    @rule(at=small)
    def void(self, at: int) -> None:
        """A request that never started, though its hold was taken."""
        request_id = self._pick(at)
        running = self.running[request_id]
        if running.tally.has_run or running.tally.finish_reasons:
            return
        del self.running[request_id]
        with self.engine.begin() as connection:
            holds.void_holds(connection, [request_id, request_id, "req_unknown"])
        self.accounts[running.tally.admitted.organization_id].free(request_id)
        self.journal.settled([request_id])

    @precondition(lambda self: self.pending)
    @rule(num=st.integers(1, 8), is_repeated=st.booleans())
    def settle(self, num: int, is_repeated: bool) -> None:
        batch = list(self.pending.values())[:num]
        with self.engine.begin() as connection:
            posting.post_settlements(connection, batch)
        self._settled(batch)
        if is_repeated:
            with pytest.raises(IntegrityError), self.engine.begin() as connection:
                posting.post_settlements(connection, batch)
            with self.engine.begin() as connection:
                assert posting.unrecorded(connection, batch) == []

    def _settled(self, batch: list[Settlement]) -> None:
        by_account: dict[str, int] = {}
        for settlement in batch:
            amount = _expected(settlement.usage, self.prices)
            admitted = settlement.usage.admitted
            account = self.account(admitted.organization_id)
            account.free(settlement.request_id, amount)
            by_account[admitted.organization_id] = (
                by_account.get(admitted.organization_id, 0) + amount
            )
            self.pending.pop(settlement.request_id, None)
        for name, amount in by_account.items():
            account = self.accounts[name]
            account.use(amount, f"{self.now:%Y-%m}")
            account.forced = min(account.forced, account.lacking(account.limit))
        self.journal.settled([settlement.request_id for settlement in batch])

    @rule()
    def crash(self) -> None:
        """The process is gone, with all it had not written; the next one recovers."""
        old, number = self.journal, self.journal_number + 1
        fresh = self.directory / f"journal{number}"
        shutil.copytree(old.directory, fresh)
        self.do(old.close())
        shutil.rmtree(old.directory)
        before = {usage.admitted.request_id for usage in read_unsettled(fresh).usages}
        usages = self._open_journal(number)
        assert {usage.admitted.request_id for usage in usages} == before
        self.running.clear()
        self.pending.clear()
        found = []
        for usage in usages:
            book = self.prices.book(usage.admitted.price_book_id)
            assert book is not None
            found.append(rate(usage, book.rates_of(usage.admitted)))
        with self.engine.begin() as connection:
            fresh_ones = posting.unrecorded(connection, found)
            posting.post_settlements(connection, fresh_ones)
        self._settled(fresh_ones)
        with self.engine.begin() as connection:
            orphans = holds.orphaned_holds(connection, self.journal.id)
            holds.void_holds(connection, orphans)
        for account in self.accounts.values():
            for request_id in list(account.holds):
                account.free(request_id)
                assert request_id in orphans

    # --- people ---------------------------------------------------------------------------

    @rule(
        organization=organizations,
        amount=amounts,
        kind=st.sampled_from(["paid", "promotional"]),
        priority=st.sampled_from([0, 50, 50]),
        hours=st.sampled_from([None, 1, 30, 800]),
    )
    def top_up(
        self, organization: str, amount: int, kind: str, priority: int, hours: int | None
    ) -> None:
        source = self.name("src")
        expires_at = None if hours is None else self.now + timedelta(hours=hours)
        from_account = STRIPE_CLEARING if kind == "paid" else PROMOTIONAL_COST

        def add(session: AsyncSession) -> Any:
            return credits.add_lot(
                session,
                organization,
                kind,
                amount,
                source=source,
                currency="usd",
                from_account=from_account,
                priority=priority,
                expires_at=expires_at,
            )

        lot_id = self.write(add)
        assert self.write(add) is None, "one payment gives credit once"
        made = (self.now, self.num_made)
        lot = model.Lot(source, kind, 0, priority, expires_at, made)
        self.account(organization).add(lot, amount)
        assert lot_id

    @rule(organization=organizations, at=small, amount=amounts)
    def take_back(self, organization: str, at: int, amount: int) -> None:
        lots = list(self.account(organization).lots)
        if not lots:
            return
        source, key = lots[at % len(lots)], self.name("refund")

        def take(session: AsyncSession) -> Any:
            return credits.take_back(
                session,
                source=source,
                amount_nano=amount,
                key=key,
                kind="refund",
                to_account=STRIPE_CLEARING,
            )

        assert self.write(take) is not None
        assert self.write(take) is None
        self.accounts[organization].take_back(source, amount)

    @rule()
    def expire(self) -> None:
        """In whatever order: no organization's lots are asked for twice."""
        due: list[str] = self.do(self._due())
        for source in due:
            for account in self.accounts.values():
                if source in account.lots:
                    account.expire(source)
        self.do(expire_credit(self.database))

    async def _due(self) -> list[str]:
        async with self.database.read() as session:
            ids = await credits.due_lots(session, clock.now())
            rows = (await session.execute(_sources())).all()
        sources = {row[0]: row[1] for row in rows}
        expected = {
            lot.id
            for account in self.accounts.values()
            for lot in account.lots.values()
            if lot.remaining and lot.expires_at is not None and lot.expires_at <= self.now
        }
        assert {sources[lot_id] for lot_id in ids} == expected
        return [sources[lot_id] for lot_id in ids]

    @rule(organization=organizations, limit=st.sampled_from([None, 0, 100, 2_000, 50_000]))
    def limit(self, organization: str, limit: int | None) -> None:
        self._set_limit(organization, limit)

    def _set_limit(self, organization: str, limit: int | None) -> None:
        is_possible = self.account(organization).set_limit(limit)

        def change(session: AsyncSession) -> Any:
            return set_spending_limit(session, organization, limit, "usd")

        if is_possible:
            self.write(change)
        else:
            with pytest.raises(Conflict):
                self.write(change)

    @rule(
        organization=organizations,
        where=st.sampled_from(
            [("organization", ""), ("key", "key_1"), ("key", "key_2"), ("model", "tiny")]
        ),
        period=st.sampled_from(["day", "month"]),
        limit=st.sampled_from([0, 500, 3_000, 100_000]),
    )
    def budget(self, organization: str, where: tuple[str, str], period: str, limit: int) -> None:
        scope, subject = where

        def change(session: AsyncSession) -> Any:
            return budgets.set_budget(
                session,
                organization,
                scope=scope,
                subject=subject,
                subject_name=subject,
                period=period,
                limit_nano=limit,
            )

        budget_id = self.write(change)
        account = self.account(organization)
        if budget_id in account.budgets:
            account.budgets[budget_id].limit = limit
            return
        fresh = model.Budget(budget_id, scope, subject, period, limit)
        starts_on = fresh.starts_on(self.now)
        with self.engine.begin() as connection:
            spent = connection.exec_driver_sql(
                "SELECT posted_nano FROM budget_window WHERE budget_id = ?", (budget_id,)
            ).scalar_one()
        assert spent == self._spent(organization, fresh, starts_on)
        fresh.windows[starts_on] = model.Window(posted=spent)
        account.budgets[budget_id] = fresh
        account.windows[budget_id, starts_on] = fresh.windows[starts_on]

    def _spent(self, organization: str, budget: model.Budget, starts_on: str) -> int:
        """By requests admitted in the window and settled by now."""
        with self.engine.begin() as connection:
            rows = connection.exec_driver_sql(
                "SELECT api_key_id, endpoint_name, started_at, amount_nano FROM usage_event"
                " WHERE organization_id = ?",
                (organization,),
            ).all()
        return sum(
            amount
            for key, endpoint, started_at, amount in rows
            if budget.concerns(key, endpoint)
            and budget.starts_on(datetime.fromisoformat(started_at)) == starts_on
        )

    @rule(organization=organizations, at=small)
    def forget_budget(self, organization: str, at: int) -> None:
        account = self.account(organization)
        if not account.budgets:
            return
        budget_id = sorted(account.budgets)[at % len(account.budgets)]
        self.write(lambda session: budgets.delete_budget(session, organization, budget_id))
        del account.budgets[budget_id]

    @rule(
        price=st.integers(0, 90),
        scale=st.sampled_from([1, 2, 3, 7]),
        dimension=st.sampled_from(["input", "cached_input", "output", "request"]),
        policy=st.sampled_from([{}, {}, {"cancelled": "waived"}, {"failed.input": "billed"}]),
    )
    def reprice(self, price: int, scale: int, dimension: str, policy: dict[str, str]) -> None:
        items = [
            Item(
                endpoint_name="*",
                dimension=name,
                service_class="standard",
                price_nano=price if name == dimension else base,
                unit_scale=scale,
            )
            for name, base in {"input": 10, "cached_input": 1, "output": 40, "request": 5}.items()
        ]
        self.write(lambda session: change_prices(session, items, "usd", policy=policy))
        self.do(self.prices.refresh())

    @rule()
    def seal(self) -> None:
        seal_all(self.engine, self.key)

    @rule()
    def close_month(self) -> None:
        self.do(self.closer.turn())

    @rule(step=st.sampled_from([(0, 1), (0, 60), (0, 1_000), (1, 0), (9, 0), (33, 0)]))
    def pass_time(self, step: tuple[int, int]) -> None:
        self.now += timedelta(days=step[0], minutes=step[1])
        self.set_clock(self.now)

    # --- judges ---------------------------------------------------------------------------

    @invariant()
    def books_are_sound(self) -> None:
        with self.engine.begin() as connection:
            found = problems(connection)
        assert not found, "\n".join(found)

    @invariant()
    def books_are_as_expected(self) -> None:
        with self.engine.begin() as connection:

            def rows(query: str) -> list[Any]:
                return list(connection.exec_driver_sql(query).all())

            balances = {
                row[0]: row[1:]
                for row in rows(
                    "SELECT organization_id, posted_nano, held_nano, forced_nano FROM account_balance"
                )
            }
            lots = dict(tuple(row) for row in rows("SELECT source, remaining_nano FROM credit_lot"))
            windows = {
                (row[0], row[1]): (row[2], row[3])
                for row in rows(
                    "SELECT budget_id, starts_on, posted_nano, held_nano FROM budget_window"
                )
            }
            recorded = dict(
                tuple(row)
                for row in rows(
                    "SELECT e.request_id, l.quantity FROM usage_event e JOIN usage_line l"
                    " ON l.event_id = e.id WHERE l.dimension = 'output'"
                )
            )
            settled = {row[0] for row in rows("SELECT request_id FROM usage_event")}
        expected = {
            name: (account.posted, account.held, account.forced)
            for name, account in self.accounts.items()
        }
        assert {name: tuple(row) for name, row in balances.items()} == expected
        for account in self.accounts.values():
            for lot in account.lots.values():
                assert lots[lot.id] == lot.remaining, lot
            for at, window in account.windows.items():
                if window.posted or window.held:
                    assert windows[at] == (window.posted, window.held)
        for request_id, num_tokens in self.delivered.items():
            if request_id in settled:
                assert recorded.get(request_id, 0) == num_tokens, (
                    "delivered is not what is on record"
                )

    @invariant()
    def months_are_invoiced_as_billed(self) -> None:
        with self.engine.begin() as connection:
            invoices = connection.exec_driver_sql(
                "SELECT organization_id, period, usage_nano FROM invoice"
            ).all()
        for organization, period, usage_nano in invoices:
            assert usage_nano == self.accounts[organization].billed[period]


def _sources() -> Any:
    from sqlalchemy import select

    from app.billing.tables import CreditLot

    return select(CreditLot.id, CreditLot.source)


def _expected(usage: Usage, prices: PriceTable) -> int:
    """What a request costs by its counts, the items of its book and the policy, by hand."""
    book = prices.book(usage.admitted.price_book_id)
    assert book is not None
    items = {i.dimension: i for i in book.items if i.service_class == "standard"}
    counts = {
        "input": usage.input_tokens,
        "cached_input": usage.cached_tokens,
        "output": usage.output_tokens,
        "request": 1,
    }
    by_default = "billed" if usage.outcome in ("completed", "cancelled") else "waived"
    amount = 0
    for name, count in counts.items():
        told = book.policy.get(f"{usage.outcome}.{name}") or book.policy.get(usage.outcome)
        if (told or by_default) == "billed":
            amount += model.line(count, items[name].price_nano, items[name].unit_scale)
    return amount


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Money]:
    path = tmp_path / "template.db"
    engine = create_writer_engine(f"sqlite:///{path}")
    upgrade(engine)
    engine.dispose()
    instant = [START]
    monkeypatch.setattr(clock, "now", lambda: instant[0])

    class Bound(Money):
        template = path
        set_clock = staticmethod(lambda at: instant.__setitem__(0, at))

    return Bound


QUICK = settings(
    max_examples=int(os.environ.get("QUICK_HISTORIES", "12")),
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(
    QUICK,
    max_examples=int(os.environ.get("SOAK_HISTORIES", "300")),
    stateful_step_count=100,
    derandomize=False,
    print_blob=True,
)


def test_every_history_leaves_the_books_right(machine: type[Money]) -> None:
    run_state_machine_as_test(machine, settings=QUICK)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_long_histories_leave_the_books_right(machine: type[Money]) -> None:
    run_state_machine_as_test(machine, settings=LONG)
