"""Credit at its edges: the last nano-unit of a lot, and the instant at which one ends."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.billing import credits
from app.billing.credits import Draw, LotState, draw, promised_to
from app.billing.ledger import STRIPE_CLEARING, lock_account
from app.billing.tables import MAX_BALANCE_NANO
from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict

NOW = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.mark.parametrize(
    ("amount_nano", "expected"),
    [
        (0, []),
        (1, [Draw("a", "paid", 1)]),
        (2, [Draw("a", "paid", 1), Draw("b", "paid", 1)]),
        (9, [Draw("a", "paid", 1), Draw("b", "paid", 5)]),
    ],
)
def test_lots_are_drawn_to_their_last_nano_unit(amount_nano: int, expected: list[Draw]) -> None:
    lots = [LotState("a", "paid", 1), LotState("z", "paid", 0), LotState("b", "paid", 5)]
    assert draw(lots, amount_nano, 0) == expected


@pytest.mark.parametrize(
    ("promised_nano", "expected"),
    [
        (0, [Draw("b", "paid", 5)]),
        (5, [Draw("b", "paid", 5)]),  # which the other lot pays
        (6, [Draw("a", "paid", 1), Draw("b", "paid", 5)]),
        (8, [Draw("a", "paid", 2), Draw("b", "paid", 5), Draw("c", "promotional", 1)]),
        (99, [Draw("a", "paid", 2), Draw("b", "paid", 5), Draw("c", "promotional", 2)]),
    ],
)
def test_lots_that_are_over_pay_for_what_they_promised_alone(
    promised_nano: int, expected: list[Draw]
) -> None:
    lots = [
        LotState("a", "paid", 2, is_over=True),
        LotState("b", "paid", 5),
        LotState("c", "promotional", 3, is_over=True),
    ]
    assert draw(lots, 9, promised_nano) == expected


@pytest.mark.parametrize(
    ("limit_nano", "posted_nano", "held_nano", "in_lots_nano", "promised_nano"),
    [
        (None, 5, 5, 5, 0),
        (0, 5, 4, 5, 4),
        (0, 0, 4, 5, 4),  # credit ends whatever else is owed
        (10, 1, 11, 1, 1),
        (10, 1, 10, 1, 0),
        (10, -8, 3, 1, 2),  # 9 are owed: the limit covers 1 of 3
    ],
)
def test_what_a_limit_covers_is_promised_of_no_credit(
    limit_nano: int | None,
    posted_nano: int,
    held_nano: int,
    in_lots_nano: int,
    promised_nano: int,
) -> None:
    assert promised_to(limit_nano, posted_nano, held_nano, in_lots_nano) == promised_nano


async def test_a_lot_ends_at_its_instant_with_its_last_nano_unit(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "now", lambda: NOW)
    async with database.write() as session:
        lot_id = await credits.add_lot(
            session,
            "org_1",
            "paid",
            1,
            source="one",
            currency="usd",
            from_account=STRIPE_CLEARING,
            expires_at=NOW + timedelta(seconds=1),
        )
        assert lot_id is not None
        assert [lot.priority for lot in await credits.open_lots(session, "org_1")] == [50]
        assert await credits.expire_due(session, lot_id) is None
        ends_at = NOW + timedelta(seconds=1)
        assert await credits.due_lots(session, ends_at - timedelta(microseconds=1)) == []
        assert await credits.due_lots(session, ends_at) == [lot_id]
        monkeypatch.setattr(clock, "now", lambda: NOW + timedelta(seconds=1))
        assert await credits.expire_due(session, lot_id) is not None
        assert list(await credits.open_lots(session, "org_1")) == []
        assert await credits.due_lots(session, ends_at) == []


@pytest.mark.parametrize("amount_nano", [0, -1])
async def test_no_credit_of_nothing(database: Database, amount_nano: int) -> None:
    with pytest.raises(AssertionError):
        async with database.write() as session:
            await credits.add_lot(
                session,
                "org_1",
                "paid",
                amount_nano,
                source="none",
                currency="usd",
                from_account=STRIPE_CLEARING,
            )


async def add(database: Database, source: str, amount_nano: int) -> str | None:
    async with database.write() as session:
        return await credits.add_lot(
            session,
            "org_1",
            "paid",
            amount_nano,
            source=source,
            currency="usd",
            from_account=STRIPE_CLEARING,
        )


async def test_an_account_holds_what_can_be_counted(database: Database) -> None:
    await add(database, "most", MAX_BALANCE_NANO - 1)
    with pytest.raises(Conflict, match="holds at most"):
        await add(database, "too much", 2)
    assert await add(database, "the last", 1)


async def test_a_prepaid_account_pays_no_invoice_by_a_top_up(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 that are owed an invoice asks for 3: credit pays the other 7."""

    async def asked_for_nano(*_: object) -> int:
        return 3

    monkeypatch.setattr(credits, "asked_for_nano", asked_for_nano)
    async with database.write() as session:
        account = await lock_account(session, "org_1", "usd")
        account.posted_nano, account.credit_limit_nano = -10, 0
    assert await add(database, "one", 20)
    async with database.read() as session:
        (lot,) = await credits.open_lots(session, "org_1")
    assert lot.remaining_nano == 13


async def test_a_source_gives_the_same_credit_again_and_no_other(database: Database) -> None:
    await add(database, "other", 7)
    lot_id = await add(database, "one", 5)
    assert await add(database, "one", 5) is None
    async with database.read() as session:
        assert (await credits.require_same_lot(session, "one", "paid", 5)).id == lot_id
        assert await credits.is_given(session, "one")
        assert not await credits.is_given(session, "two")
        for kind, amount_nano in (("paid", 7), ("promotional", 5)):
            with pytest.raises(Conflict):
                await credits.require_same_lot(session, "one", kind, amount_nano)
        others: list[dict[str, Any]] = [{"priority": 49}, {"expires_at": NOW}, {"note": "other"}]
        for other in others:
            with pytest.raises(Conflict, match="priority 50, no end, note ''"):
                await credits.require_same_lot(session, "one", "paid", 5, **other)
