"""What people and the clerk do: pay, take back, set limits, budgets and prices, close months."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    rule,
)
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing import budgets, credits
from app.billing.ledger import PROMOTIONAL_COST, STRIPE_CLEARING
from app.billing.payments import steady_clock
from app.billing.payments.expiry import expire_credit
from app.billing.price_changes import change_prices
from app.billing.prices import Item
from app.billing.sealing import seal_all
from app.billing.service import set_spending_limit
from app.billing.tables import CreditLot
from app.core import clock
from app.core.errors import Conflict
from app.organizations.service import DEFAULT_NAME, create_organization
from tests.evidence import model
from tests.evidence.machine.base import ORGANIZATIONS, amounts, organizations, small
from tests.evidence.machine.requests import Requests


class Money(Requests):
    """One box with three organizations."""

    @initialize(limits=st.permutations([None, 0, 5_000]))
    def begin(self, limits: list[int | None]) -> None:
        self.write(lambda session: create_organization(session, DEFAULT_NAME, is_operator=True))
        for name, limit in zip(ORGANIZATIONS, limits, strict=True):
            self._set_limit(name, limit)

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

    def _expire(self) -> None:
        due: list[str] = self.do(self._due())
        for source in due:
            for account in self.accounts.values():
                if source in account.lots:
                    account.expire(source)
        self.do(expire_credit(self.database))

    async def _due(self) -> list[str]:
        async with self.database.read() as session:
            ids = await credits.due_lots(session, clock.now())
            rows = (await session.execute(select(CreditLot.id, CreditLot.source))).all()
        sources = {row[0]: row[1] for row in rows}
        expected = {
            lot.id
            for account in self.accounts.values()
            for lot in account.lots.values()
            if lot.remaining and lot.expires_at is not None and lot.expires_at <= self.now
        }
        assert {sources[lot_id] for lot_id in ids} == expected
        return [sources[lot_id] for lot_id in ids]

    @rule(organization=organizations, limit=st.sampled_from([None, 0, 3_000, 50_000]))
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
        is_forgotten=st.sampled_from([False, False, True]),
        limit=st.sampled_from([100_000, 20_000, 5_000, 0]),
    )
    def budget(
        self,
        organization: str,
        where: tuple[str, str],
        period: str,
        is_forgotten: bool,
        limit: int,
    ) -> None:
        scope, subject = where
        if is_forgotten:
            return self._forget_budget(organization, limit)

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

    def _forget_budget(self, organization: str, at: int) -> None:
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

    @rule(is_closing=st.booleans(), is_sealing=st.booleans(), is_expiring=st.booleans())
    def keep_books(self, is_closing: bool, is_sealing: bool, is_expiring: bool) -> None:
        """What the clerk does."""
        if is_expiring:
            self._expire()
        if is_closing:
            self.do(self.closer.turn())
            self.write(lambda session: steady_clock.confirm(session, self.now))  # after a leap
            self.do(self.closer.turn())
        if is_sealing:
            seal_all(self.engine, self.key)

    @rule(step=st.sampled_from([(0, 1), (0, 60), (0, 1_000), (1, 0), (9, 0), (33, 0)]))
    def pass_time(self, step: tuple[int, int]) -> None:
        self.now += timedelta(days=step[0], minutes=step[1])
        self.set_clock(self.now)
