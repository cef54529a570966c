"""Lives of a process that does the clerk's work, one fork each: it may be killed at a failpoint.

Each line on standard input is a `Life` as JSON; the answer is a line with its exit status, that
of a process which a signal ended being negative.
"""

import asyncio
import os
import signal
import sys
import traceback
from contextlib import ExitStack
from datetime import datetime, timedelta

import msgspec
from sqlalchemy import select

from app.billing.payments import invoice_ending
from app.billing.payments.calls import Calls
from app.billing.payments.expiry import expire_credit
from app.billing.payments.invoice_books import refresh_invoice
from app.billing.payments.invoice_push import push_invoices
from app.billing.payments.invoices import MonthCloser
from app.billing.payments.notice_delivery import deliver_notices
from app.billing.payments.service import Payments
from app.billing.payments.tables import Invoice
from app.billing.payments.watches import watch_balances
from app.core import clock
from app.core.database import Database
from app.core.failpoints import Countdown, observed
from app.settings import Settings

ROUNDS = 4


class Life(msgspec.Struct, frozen=True):
    """`failpoint` is as in the environment's FAILPOINT; empty: it ends in peace."""

    url: str
    stripe_url: str
    stripe_key: str
    begins_at: datetime
    failpoint: str = ""


def main() -> None:
    for line in sys.stdin:
        life = msgspec.json.decode(line, type=Life)
        pid = os.fork()
        if pid == 0:
            _live(life)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _live(life: Life) -> None:
    status = 1
    try:
        with ExitStack() as stack:
            if life.failpoint:
                stack.enter_context(observed(Countdown(life.failpoint, _kill)))
            asyncio.run(work(life))
        status = 0
    except BaseException:  # noqa: BLE001 - of a child, whose parent reads the status
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def work(life: Life) -> None:
    """Everything that the clerk does about months, some rounds of it, with ten minutes between."""
    clock.now = lambda: life.begins_at
    settings = Settings(
        database_url=life.url, stripe_api_key=life.stripe_key, stripe_api_base=life.stripe_url
    )
    database, calls = Database(settings.async_database_url), Calls()
    payments = Payments(database, settings, invoice_ending.kinds())
    await payments.link.outbox.resume()
    closer = MonthCloser(database, "usd", has_stripe=True)
    for number in range(ROUNDS):
        now = life.begins_at + number * timedelta(minutes=10)
        clock.now = lambda now=now: now
        await expire_credit(database)
        await closer.turn()
        await push_invoices(database, has_stripe=True)
        await payments.link.outbox.turn()
        async with database.read() as session:
            ids = (await session.scalars(select(Invoice.stripe_invoice_id))).all()
        for stripe_invoice_id in filter(None, ids):
            await refresh_invoice(database, payments.link.stripe, calls, stripe_invoice_id)
        await watch_balances(database)
        await deliver_notices(database)
    await payments.close()
    calls.close()
    await database.close()


if __name__ == "__main__":
    main()
