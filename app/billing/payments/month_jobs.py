"""The clerk's jobs around months: closing them, sending invoices, ending credit, telling people.

Owns how often each is done and what one sets off in another.
"""

from functools import partial

from app.billing.clerk import Clerk
from app.billing.payments.expiry import expire_credit
from app.billing.payments.invoice_push import push_invoices
from app.billing.payments.invoices import MonthCloser
from app.billing.payments.notice_delivery import deliver_notices
from app.billing.payments.watches import watch_balances, watch_budgets
from app.core.database import Database

MONTHS_SECONDS = 60
EXPIRY_SECONDS = 60
WATCH_SECONDS = 15
DELIVERY_SECONDS = 10


def add_month_jobs(clerk: Clerk, database: Database, currency: str, *, has_stripe: bool) -> None:
    closer = MonthCloser(database, currency, has_stripe=has_stripe)

    async def close_months() -> None:
        await closer.turn()
        if await push_invoices(database, has_stripe=has_stripe):
            clerk.wake("outbox")

    async def watch() -> None:
        if await watch_balances(database) + await watch_budgets(database, currency):
            clerk.wake("notices")

    clerk.add("months", MONTHS_SECONDS, close_months)
    clerk.add("credit expiry", EXPIRY_SECONDS, partial(expire_credit, database))
    clerk.add("watches", WATCH_SECONDS, watch)
    clerk.add("notices", DELIVERY_SECONDS, partial(deliver_notices, database))
