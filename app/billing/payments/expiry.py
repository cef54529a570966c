"""Expiry of credit: what is left of lots whose time is over goes to whom it falls.

Owns when it is looked for; the posting is `credits.py`'s.
"""

import logging

from app.billing.credits import due_lots, expire_due
from app.core import clock
from app.core.database import Database
from app.core.failpoints import failpoint

log = logging.getLogger(__name__)


async def expire_credit(database: Database) -> int:
    """Ends every lot that is due, each in a transaction of its own, and returns how many postings
    that took. What running requests hold stays until they are settled: the next turn ends it."""
    async with database.read() as session:
        lot_ids = await due_lots(session, clock.now())
    num_posted = 0
    for lot_id in lot_ids:
        async with database.write() as session:
            num_posted += await expire_due(session, lot_id) is not None
            failpoint("expiry.before_commit")
        failpoint("expiry.after_commit")
    if num_posted:
        log.info("%d lots of credit expired", num_posted)
    return num_posted
