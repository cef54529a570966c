"""Ends of requests on record, and their settlements.

Owns that an end is in the journal in time: before anybody is told of it, where the steps on record
show another one. What each kind of request ends as is `relay.py`'s.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from app.api.endings import Ending, unanswered
from app.api.execution import Execution
from app.billing.accounts import AccountWriter
from app.billing.prices import Rates
from app.billing.rating import Settlement, rate
from app.core.errors import Unavailable
from app.core.failpoints import failpoint
from app.metering.journal import Journal
from app.metering.meters import Meters
from app.metering.records import FinishRecord, Outcome, Tally, Usage
from runtime.protocol import Embedded, Predicted

TELL_SECONDS = 5.0  # a disk that takes longer does not keep callers from hearing of a failure

log = logging.getLogger(__name__)
R = TypeVar("R", Embedded, Predicted)
T = TypeVar("T")


class Settling:
    """One per relay."""

    def __init__(self, journal: Journal, accounts: AccountWriter, meters: Meters) -> None:
        self._journal = journal
        self._accounts = accounts
        self._meters = meters

    async def answered(
        self,
        answer: Callable[[R, Usage], Awaitable[T]],
        ran: R,
        tally: Tally,
    ) -> tuple[T | Ending, Usage]:
        """Of a run: what its caller is told and what it is settled as, once that is durable. The
        answer is made first, as the end depends on whether it can be. Raises `Unavailable`."""
        counted = Tally(tally.admitted)
        counted.device_ns = ran.device_ns
        told: T | Ending
        try:
            told = await answer(ran, counted.usage("completed", "stop", time.time_ns()))
        except Exception as error:  # noqa: BLE001 - it is logged, and what the caller gets
            told = unanswered(tally.admitted.request_id, error)
        return told, await self.ended(tally, ran.device_ns, told)

    async def ended(
        self, tally: Tally, device_ns: int, told: object, num_prompt_tokens: int | None = None
    ) -> Usage:
        """What a run is settled as, once that is durable. `num_prompt_tokens`: where not all of the
        prompt ran. Raises `Unavailable`."""
        outcome, reason = told[:2] if isinstance(told, Ending) else ("completed", "stop")
        request_id = tally.admitted.request_id
        record = FinishRecord(
            request_id, time.time_ns(), outcome, reason, device_ns, num_prompt_tokens
        )
        failpoint("relay.before_finish")
        await self._journal.finish(record)
        failpoint("relay.after_finish")
        tally.close(record)
        return tally.usage(outcome, reason, record.at_ns)

    async def tell(self, execution: Execution, ending: Ending) -> None:
        """Of a generation that the steps on record may show as completed: its caller hears of the
        end once that is durable, so that no crash charges for what was told to have failed."""
        request_id, (outcome, reason, error) = execution.request_id, ending
        try:
            async with asyncio.timeout(TELL_SECONDS):
                await self._journal.finish(
                    FinishRecord(request_id, time.time_ns(), outcome, reason)
                )
        except (TimeoutError, Unavailable):
            log.error("%s: its end is not on record yet", request_id)
        failpoint("relay.before_failure_told")
        execution.fail(error)

    def settle(
        self, tally: Tally, rates: Rates, outcome: Outcome, reason: str, device_ns: int = 0
    ) -> None:
        """Queues the settlement; an end that the steps do not show is put on record first, with
        the device time that they do not."""
        at_ns = time.time_ns()
        if (outcome, reason) != tally.outcome():
            request_id = tally.admitted.request_id
            record = FinishRecord(request_id, at_ns, outcome, reason, device_ns)
            self._journal.note_finish(record)
            tally.close(record)
        self.post(rate(tally.usage(outcome, reason, at_ns), rates))

    def post(self, settlement: Settlement) -> None:
        self._meters.observe(settlement.usage)
        self._accounts.settle(settlement)
