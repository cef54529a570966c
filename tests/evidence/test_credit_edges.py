"""Credit at its edges: the last nano-unit of a lot, and the instant at which one ends."""

from datetime import UTC, datetime, timedelta

import pytest

from app.billing import credits
from app.billing.credits import Draw, LotState, draw
from app.billing.ledger import STRIPE_CLEARING
from app.core import clock
from app.core.database import Database

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
    assert draw(lots, amount_nano) == expected


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
        monkeypatch.setattr(clock, "now", lambda: NOW + timedelta(seconds=1))
        assert await credits.expire_due(session, lot_id) is not None
        assert list(await credits.open_lots(session, "org_1")) == []


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
