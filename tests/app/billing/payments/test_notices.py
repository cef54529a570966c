"""People are told once of what is so, at an address that may be told, with a signature that a
receiver can check."""

import hashlib
import hmac
import json
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select, update

from app.billing.ledger import lock_account
from app.billing.payments import notice_delivery
from app.billing.payments.notice_delivery import (
    SIGNATURE_HEADER,
    check_notify_url,
    deliver_notices,
    is_public,
)
from app.billing.payments.notices import dismiss, end, notify, shown_notices
from app.billing.payments.profile import open_profile
from app.billing.payments.tables import Notice
from app.billing.payments.watches import watch_balances, watch_budgets
from app.billing.tables import AccountBalance, Budget, BudgetWindow
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest, NotFound
from app.core.failpoints import Countdown, Reached, observed
from app.settings import Settings
from tests.app.billing.payments.months import CENT, OPERATOR, ORGANIZATION, Clock, Months

SECRET = "nsec_test"


class Receiver:
    """Somebody's server, which keeps what it is sent."""

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        self.status = 200
        received = self.received
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append((dict(self.headers), body))
                self.send_response(outer.status)
                if outer.status == 302:
                    self.send_header("Location", outer.url)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://localhost:{self._server.server_address[1]}/hook?x=1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
async def months(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Months]:
    months = Months(database, settings.sync_database_url, Clock(monkeypatch, "2026-01-10"))
    await months.add_organizations(ORGANIZATION)
    yield months
    months.close()


async def tell(months: Months, organization_id: str = OPERATOR, **data: int) -> str | None:
    async with months.database.write() as session:
        return await notify(session, organization_id, "low_balance", "It is low.", data)


async def set_url(months: Months, url: str, organization_id: str = OPERATOR) -> None:
    async with months.database.write() as session:
        await lock_account(session, organization_id, "usd")
        profile = await open_profile(session, organization_id)
        profile.notify_url, profile.notify_secret = url, SECRET


async def notices(months: Months) -> list[Notice]:
    async with months.database.read() as session:
        return list(await session.scalars(select(Notice).order_by(Notice.created_at)))


async def test_there_is_one_open_notice_of_a_kind(months: Months) -> None:
    first = await tell(months, left=5)
    assert first is not None
    assert await tell(months, left=3) is None
    (kept,) = await notices(months)
    assert kept.data == {"left": 3}
    async with months.database.write() as session:
        with pytest.raises(NotFound):
            await dismiss(session, ORGANIZATION, first)
        await dismiss(session, OPERATOR, first)
        assert await shown_notices(session, OPERATOR) == []
    assert await tell(months) is None  # it is so still, and is not shown again
    async with months.database.write() as session:
        assert await end(session, OPERATOR, "low_balance")
        assert not await end(session, OPERATOR, "low_balance")
    assert await tell(months) is not None
    async with months.database.write() as session:
        assert len(await shown_notices(session, OPERATOR)) == 1
        await notify(session, OPERATOR, "low_balance", "Another.", {}, subject="x")
        assert len(await shown_notices(session, OPERATOR)) == 2


async def test_a_notice_arrives_signed(months: Months, receiver: Receiver) -> None:
    await set_url(months, receiver.url)
    notice_id = await tell(months, left=5)
    assert await deliver_notices(months.database) == 1
    ((headers, body),) = receiver.received
    time, signature = (part.partition("=")[2] for part in headers[SIGNATURE_HEADER].split(","))
    assert int(time) == int(clock.now().timestamp())
    expected = hmac.new(SECRET.encode(), f"{time}.".encode() + body, hashlib.sha256).hexdigest()
    assert signature == expected
    assert headers["Host"] == httpx.URL(receiver.url).netloc.decode()
    told = json.loads(body)
    assert (told["id"], told["kind"], told["data"]) == (notice_id, "low_balance", {"left": 5})
    (notice,) = await notices(months)
    assert notice.delivered_at is not None
    assert await deliver_notices(months.database) == 0


async def test_what_does_not_arrive_is_sent_again_for_three_days(
    months: Months, receiver: Receiver
) -> None:
    await set_url(months, receiver.url)
    await tell(months)
    receiver.status = 500
    begun_at, waits = clock.now(), []
    while (await notices(months))[0].next_at is not None:
        (notice,) = await notices(months)
        assert notice.next_at is not None
        waits.append(notice.next_at - months.clock.at)
        months.clock.at = notice.next_at
        assert await deliver_notices(months.database) == 1
    (notice,) = await notices(months)
    assert notice.delivered_at is None
    assert "500" in notice.delivery_error
    assert notice.num_attempts == len(receiver.received) > 10
    assert timedelta(days=2.5) < months.clock.at - begun_at <= timedelta(days=3)
    assert waits == sorted(waits)


async def test_an_attempt_is_on_record_before_it_is_made(
    months: Months, receiver: Receiver
) -> None:
    await set_url(months, receiver.url)
    await tell(months)

    def crash(name: str) -> None:
        raise Reached(name)

    crashes = Countdown("notice_delivery.after_send", crash)
    with pytest.raises((Reached, BaseExceptionGroup)), observed(crashes):
        await deliver_notices(months.database)
    (notice,) = await notices(months)
    assert (notice.num_attempts, notice.delivered_at) == (1, None)
    assert await deliver_notices(months.database) == 0  # not at once
    months.clock.at += timedelta(minutes=1)
    await deliver_notices(months.database)
    assert [json.loads(body)["id"] for _, body in receiver.received] == [notice.id] * 2


async def test_redirects_are_not_followed(months: Months, receiver: Receiver) -> None:
    await set_url(months, receiver.url)
    await tell(months)
    receiver.status = 302
    await deliver_notices(months.database)
    assert len(receiver.received) == 1
    assert "302" in (await notices(months))[0].delivery_error


async def test_nobody_but_the_operator_reaches_into_the_network(
    months: Months, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = httpx.URL(receiver.url).port
    for url in (receiver.url, f"https://localhost:{port}/", f"https://[::1]:{port}/"):
        await set_url(months, url, ORGANIZATION)
        await tell(months, ORGANIZATION)
        await deliver_notices(months.database)
        notice = (await notices(months))[-1]
        assert "https addresses only" in notice.delivery_error or (
            "is not on the public internet" in notice.delivery_error
        )
        async with months.database.write() as session:
            await end(session, ORGANIZATION, "low_balance")
        months.clock.at += timedelta(seconds=1)
    assert receiver.received == []


async def test_without_an_address_nothing_is_sent(months: Months) -> None:
    await tell(months)
    await deliver_notices(months.database)
    assert (await notices(months))[0].next_at is None


async def test_what_cannot_be_found_or_reached_is_told(months: Months) -> None:
    for url, words in (
        ("http://no-such-host.invalid/", "not found"),
        ("http://127.0.0.1:1/", "onnect"),
    ):
        await set_url(months, url)
        await tell(months)
        await deliver_notices(months.database)
        notice = (await notices(months))[-1]
        assert words in notice.delivery_error
        assert notice.next_at is not None
        async with months.database.write() as session:
            await end(session, OPERATOR, "low_balance")
        months.clock.at += timedelta(seconds=1)


@pytest.mark.parametrize(
    ("address", "is_right"),
    [
        ("1.1.1.1", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("192.168.1.1", False),
        ("0.0.0.0", False),  # noqa: S104 - not bound to
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:1.1.1.1", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
        ("fec0::1", False),
        ("192.88.99.1", False),
    ],
)
def test_public_addresses(address: str, is_right: bool) -> None:
    assert is_public(address) is is_right


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/",
        "https://",
        "example.com/hook",
        "https://user:word@example.com/",
        "https://example.com/\n",
        "https://example.com/#x",
        "https://example.com/" + "x" * 500,
        "http://example.com/",
    ],
)
def test_bad_addresses_are_refused(url: str) -> None:
    if url.endswith("\n"):
        url = url[:-1] + "\na"
    with pytest.raises(InvalidRequest):
        check_notify_url(url, is_operator=False)


def test_good_addresses_are_taken() -> None:
    assert check_notify_url(" https://example.com:8443/x?y=1 ", is_operator=False) == (
        "https://example.com:8443/x?y=1"
    )
    assert check_notify_url("http://10.0.0.5/hook", is_operator=True) == "http://10.0.0.5/hook"
    assert check_notify_url("", is_operator=False) == ""


async def test_the_connection_goes_to_the_address_that_was_looked_at(
    months: Months, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads elsewhere the second time leads nowhere: it is not asked again."""
    seen: list[str] = []

    async def address(url: httpx.URL, *, is_trusted: bool) -> str:
        seen.append(url.host)
        return "127.0.0.1"

    monkeypatch.setattr(notice_delivery, "_address", address)
    port = httpx.URL(receiver.url).port
    await set_url(months, f"http://rebinding.invalid:{port}/")
    await tell(months)
    await deliver_notices(months.database)
    assert seen == ["rebinding.invalid"]
    ((headers, _),) = receiver.received
    assert headers["Host"] == f"rebinding.invalid:{port}"


async def test_a_low_balance_is_told_once_until_it_has_recovered(months: Months) -> None:
    async def told() -> list[bool]:
        await watch_balances(months.database)
        return [notice.ended_at is None for notice in await notices(months)]

    await months.credit(1000 * CENT, "paid")
    await months.limit(0)
    assert await told() == []
    months.use(499 * CENT)
    assert await told() == []
    months.use(2 * CENT)  # 4.99 is left, of the 5 that prepaid accounts are told at
    assert await told() == [True]
    await months.credit(50 * CENT)
    assert await told() == [True]  # 5.49: not enough to be over it
    months.use(40 * CENT)
    assert await told() == [True]
    await months.credit(200 * CENT)
    assert await told() == [False]
    await set_url(months, "", ORGANIZATION)
    async with months.database.write() as session:
        await lock_account(session, ORGANIZATION, "usd")
        (await open_profile(session, ORGANIZATION)).low_balance_nano = 800 * CENT
    assert await told() == [False, True]
    (_, notice) = await notices(months)
    assert notice.data["threshold_nano"] == 800 * CENT
    async with months.database.write() as session:
        (await open_profile(session, ORGANIZATION)).low_balance_nano = 0  # never
    assert await told() == [False, False]


async def test_what_running_requests_hold_counts_as_used(months: Months) -> None:
    await months.credit(1000 * CENT, "paid")
    await months.limit(0)
    async with months.database.write() as session:
        await session.execute(
            update(AccountBalance)
            .where(AccountBalance.organization_id == ORGANIZATION)
            .values(held_nano=600 * CENT)
        )
    assert await watch_balances(months.database) == 1


async def test_nobody_without_a_limit_is_told_of_a_balance(months: Months) -> None:
    months.use(10_000 * CENT)
    assert await watch_balances(months.database) == 0


async def test_budgets_are_told_of_when_nearly_and_when_all_is_spent(months: Months) -> None:
    async def spend(nano: int, starts_on: str = "2026-01-10") -> list[tuple[str, bool]]:
        async with months.database.write() as session:
            await session.execute(
                update(BudgetWindow)
                .where(BudgetWindow.starts_on == starts_on)
                .values(posted_nano=nano)
            )
        await watch_budgets(months.database, "usd")
        return [(notice.kind, notice.ended_at is None) for notice in await notices(months)]

    async with months.database.write() as session:
        session.add(
            Budget(
                id="bdg_1",
                organization_id=ORGANIZATION,
                scope="model",
                subject="tiny",
                period="day",
                limit_nano=100 * CENT,
                created_at=clock.now(),
            )
        )
        await session.execute(
            insert(BudgetWindow),
            [
                {
                    "budget_id": "bdg_1",
                    "starts_on": f"2026-01-{day}",
                    "organization_id": ORGANIZATION,
                    "limit_nano": 100 * CENT,
                    "posted_nano": 0,
                    "held_nano": 0,
                }
                for day in ("09", "10", "11")
            ],
        )
    assert await spend(95 * CENT, "2026-01-09") == []  # yesterday's
    assert await spend(79 * CENT) == []
    assert await spend(80 * CENT) == [("budget_nearly_spent", True)]
    assert "daily budget of the model tiny ($1.00) is 80 % spent" in (
        (await notices(months))[0].message
    )
    assert await spend(99 * CENT) == [("budget_nearly_spent", True)]
    assert await spend(100 * CENT) == [("budget_nearly_spent", False), ("budget_spent", True)]
    months.clock.set("2026-01-11")
    assert await spend(100 * CENT) == [("budget_nearly_spent", False), ("budget_spent", False)]


async def test_one_organization_delays_nobody_else(
    months: Months, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many notices it has due, and however long its address takes."""
    await set_url(months, "https://slow.example", ORGANIZATION)
    await set_url(months, "https://good.example")
    async with months.database.write() as session:
        for number in range(200):
            await notify(session, ORGANIZATION, "test", "", {}, subject=f"{number}")
    await tell(months)
    sent: list[str] = []

    async def send(delivery: notice_delivery._Delivery) -> str:
        sent.append(delivery.url)
        return "no answer"

    monkeypatch.setattr(notice_delivery, "_send", send)
    await notice_delivery.deliver_notices(months.database)
    assert sent.count("https://good.example") == 1
    assert sent.count("https://slow.example") == notice_delivery.MAX_OF_ONE
