"""The outbox: does at Stripe what was planned, each once, whatever fails in between.

Every attempt is on record before it is made, under one idempotency key. While it is unclear
whether it happened, it is looked for and repeated under the same key, but only while Stripe is sure
to know the key; after that it is only looked for. What an operation means is its kind's.
"""

import asyncio
import logging
from collections.abc import Iterable
from datetime import timedelta

import msgspec
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import lock_account
from app.billing.payments import mirror
from app.billing.payments.calls import Calls
from app.billing.payments.notices import alarm, end_alarm, notify
from app.billing.payments.operations import (
    MAX_ERROR_CHARS,
    OPEN_STATES,
    Answer,
    Kind,
    NotNeeded,
    Operation,
    Refusal,
    after_seconds,
    backoff_seconds,
    due_ids,
    locked,
    operation_of,
    plan,
)
from app.billing.payments.tables import StripeOperation
from app.billing.stripe import Stripe
from app.billing.stripe_errors import (
    StripeBusy,
    StripeKeyReused,
    StripeRejected,
    StripeUnauthorized,
    StripeUnknown,
)
from app.core import clock
from app.core.database import Database, Transaction
from app.core.errors import Conflict, NotFound
from app.core.failpoints import failpoint
from app.organizations.service import default_organization_id

MAX_DUE = 200  # taken up at once
NUM_AT_ONCE = 4  # of these are with Stripe: none is claimed long before its turn comes
LEASE_SECONDS = 300  # longer than any call with its own retries
LONGEST_WAIT_SECONDS = 300
SEARCH_AGAIN_SECONDS = 3600
WAIT_SECONDS = 5  # for what an operation needs first
# Stripe forgets keys after 24 hours. Its lists are current by then, so that what is not in them
# did not happen.
RESEND_WITHIN = timedelta(hours=23)
ABSENT_AFTER = timedelta(hours=25)

log = logging.getLogger(__name__)


class Claim(msgspec.Struct, frozen=True):
    """One attempt. `is_first`: no earlier one may have reached Stripe."""

    operation: Operation
    num_attempts: int
    is_first: bool
    may_send: bool
    is_absence_final: bool


class Outbox:
    """One per process; several may run on one database."""

    def __init__(
        self,
        database: Database,
        stripe: Stripe,
        calls: Calls,
        kinds: Iterable[Kind],
        currency: str,
    ) -> None:
        self._database = database
        self._stripe = stripe
        self._calls = calls
        self._kinds = {kind.name: kind for kind in kinds}
        self._currency = currency
        self._slots = asyncio.Semaphore(NUM_AT_ONCE)

    async def resume(self) -> None:
        """What an earlier process was at is due at once."""
        async with self._database.write() as session:
            await session.execute(
                update(StripeOperation)
                .where(StripeOperation.state.in_(("sent", "unknown")))
                .values(next_at=clock.now())
            )

    async def turn(self, organization_id: str | None = None) -> None:
        """Does what is due, of one organization or of all; one organization's in order."""
        tried: set[str] = set()
        while True:
            async with self._database.read() as session:
                due = await due_ids(session, clock.now(), organization_id, MAX_DUE)
            chains: dict[str, list[str]] = {}
            for owner_id, operation_id in due:
                if operation_id not in tried:
                    chains.setdefault(owner_id, []).append(operation_id)
            if not chains:
                return
            tried.update(*chains.values())
            await asyncio.gather(*(self._work_through(*chain) for chain in chains.items()))

    async def look_again(self, transaction: Transaction, operation_id: str) -> StripeOperation:
        """For one in doubt: whether Stripe lists it by now. Raises `NotFound`, `Conflict`."""
        async with transaction as session:
            row = await self._doubted(session, operation_id)
            # Without an attempt on record it would be sent.
            row.first_sent_at = row.first_sent_at or row.created_at
            row.state, row.next_at = "unknown", clock.now()
        await self._work(row.organization_id, row.id, may_send=False)
        async with self._database.read() as session:
            return await session.get_one(StripeOperation, operation_id)

    async def abandon(self, transaction: Transaction, operation_id: str) -> StripeOperation:
        """For one in doubt, when a person has seen that Stripe did not do it. Raises `NotFound`,
        `Conflict`."""
        async with transaction as session:
            row = await self._doubted(session, operation_id)
            reason = "The operator saw that Stripe did not do it."
            row.state, row.error = "rejected", reason
            await self._kinds[row.kind].refused(session, operation_of(row), Refusal(reason))
            await end_alarm(session, "payment_in_doubt", operation_id)
            failpoint("outbox.before_abandon_commit")
            return row

    async def _doubted(self, session: AsyncSession, operation_id: str) -> StripeOperation:
        """The row, its account locked."""
        row = await session.get(StripeOperation, operation_id)
        if row is None:
            raise NotFound(f"There is no operation {operation_id!r}.", code="operation_not_found")
        await lock_account(session, row.organization_id, self._currency)
        row = await locked(session, operation_id)
        if row.state != "quarantined":
            raise Conflict(
                f"The operation is {row.state}: only what is in doubt (quarantined) is decided.",
                code="not_in_doubt",
            )
        return row

    async def _work_through(self, organization_id: str, operation_ids: list[str]) -> None:
        for operation_id in operation_ids:
            try:
                async with self._slots:
                    await self._work(organization_id, operation_id)
            except Exception as error:
                log.exception("operation %s could not be worked on", operation_id)
                await self._put_off(organization_id, operation_id, repr(error))

    async def _put_off(self, organization_id: str, operation_id: str, reason: str) -> None:
        """What fails here would be due again at once, and keep others from their turn."""
        async with self._database.write() as session:
            await lock_account(session, organization_id, self._currency)
            row = await locked(session, operation_id)
            if row.state in OPEN_STATES:
                row.num_attempts += 1
                row.error = reason[:MAX_ERROR_CHARS]
                wait_seconds = backoff_seconds(row.num_attempts, LONGEST_WAIT_SECONDS)
                row.next_at = max(row.next_at, after_seconds(wait_seconds))

    async def _work(
        self, organization_id: str, operation_id: str, *, may_send: bool = True
    ) -> None:
        claim = await self._claim(organization_id, operation_id)
        failpoint("outbox.after_claim_commit")
        if claim is None:
            return
        if not may_send:
            claim = msgspec.structs.replace(claim, may_send=False, is_absence_final=True)
        try:
            answer = await self._ask(claim)
        except StripeBusy as error:
            await self._postpone(claim, error)
        except StripeUnknown as error:
            # The answer under this key is saved, it was looked for, and is not there.
            if error.is_saved and self._is_harmless_twice(claim) and not claim.is_first:
                await self._give_up(claim)
            else:
                await self._doubt(claim, str(error), _wait(claim))
        except StripeRejected as error:
            await self._refuse(claim, error)
        except StripeKeyReused as error:
            await self._quarantine(claim, str(error))
        else:
            failpoint("outbox.after_call")
            if answer is not None:
                await self._confirm(claim, answer)
            elif claim.is_absence_final:
                await self._give_up(claim)
            else:
                await self._doubt(claim, "Stripe does not list it so far", SEARCH_AGAIN_SECONDS)
        failpoint("outbox.after_result_commit")

    async def _claim(self, organization_id: str, operation_id: str) -> Claim | None:
        """Takes the operation if it is still due, and records the attempt."""
        now = clock.now()
        async with self._database.write() as session:
            await lock_account(session, organization_id, self._currency)
            row = await locked(session, operation_id)
            if row.state not in OPEN_STATES or row.next_at > now:
                return None
            is_first = row.first_sent_at is None
            if is_first and not await self._is_prepared(session, row):
                return None
            if row.first_sent_at is not None and row.first_sent_at > now:
                # The clock was ahead: nobody knows how long ago that was, and it is only searched.
                row.first_sent_at = now - RESEND_WITHIN
            since_first = now - (row.first_sent_at or now)
            may_send = since_first < RESEND_WITHIN
            row.first_sent_at = row.first_sent_at or now
            row.num_attempts += 1
            row.state = "sent" if may_send else "unknown"
            row.next_at = after_seconds(LEASE_SECONDS)
            failpoint("outbox.before_claim_commit")
            return Claim(
                operation_of(row), row.num_attempts, is_first, may_send, since_first >= ABSENT_AFTER
            )

    async def _is_prepared(self, session: AsyncSession, row: StripeOperation) -> bool:
        kind, operation = self._kinds[row.kind], operation_of(row)
        try:
            params = await kind.prepare(session, operation)
        except NotNeeded as reason:
            row.state, row.error = "rejected", str(reason)[:MAX_ERROR_CHARS]
            return False
        if params is None:
            row.next_at = after_seconds(WAIT_SECONDS)
            return False
        row.params = params
        return True

    async def _ask(self, claim: Claim) -> Answer | None:
        operation = claim.operation
        kind = self._kinds[operation.kind]
        failpoint("outbox.before_call")
        if not claim.is_first:
            try:
                found = await self._calls(kind.find, self._stripe, operation)
            except StripeRejected as error:
                raise StripeUnknown(f"It could not be looked for: {error}") from error
            if found is not None or not claim.may_send:
                return found
        return await self._calls(kind.send, self._stripe, operation)

    async def _confirm(self, claim: Claim, answer: Answer) -> None:
        operation = claim.operation
        async with self._database.write() as session:
            row = await self._still_open(session, operation)
            if row is None:
                return
            row.state, row.stripe_id, row.error = "confirmed", answer.id, ""
            await mirror.store(session, answer)
            await self._kinds[operation.kind].confirmed(session, operation, answer)
            if claim.num_attempts > 1:
                await end_alarm(session, "payment_in_doubt", operation.id)
                await end_alarm(session, "stripe_unauthorized", "")
            failpoint("outbox.before_result_commit")

    async def _refuse(self, claim: Claim, error: StripeRejected) -> None:
        operation = claim.operation
        log.warning("Stripe refused %s: %s", operation.id, error.message)
        why = Refusal(error.message, error.code, error.decline_code, error.payment_id)
        async with self._database.write() as session:
            row = await self._still_open(session, operation)
            if row is None:
                return
            row.state, row.error = "rejected", error.message[:MAX_ERROR_CHARS]
            await self._kinds[operation.kind].refused(session, operation, why)
            failpoint("outbox.before_refusal_commit")

    async def _postpone(self, claim: Claim, error: StripeBusy) -> None:
        """This attempt came to nothing. If it was the first, it never began."""
        operation = claim.operation
        async with self._database.write() as session:
            row = await self._still_open(session, operation)
            if row is None:
                return
            if claim.is_first:
                row.state, row.first_sent_at = "planned", None
            else:
                row.state = "unknown"
            row.error = str(error)[:MAX_ERROR_CHARS]
            row.next_at = after_seconds(max(_wait(claim), error.retry_after_seconds))
        if isinstance(error, StripeUnauthorized):
            await self._tell_of_key(error)

    async def _tell_of_key(self, error: StripeUnauthorized) -> None:
        """One notice however many wait for the key: by itself, as it locks the operator's
        account."""
        async with self._database.write() as session:
            await notify(
                session,
                await default_organization_id(session),
                "stripe_unauthorized",
                "Stripe does not accept TAPEOUT_STRIPE_API_KEY, so that payments wait: set one "
                f"that may do everything, and restart the box. {error}",
                {},
            )

    async def _doubt(self, claim: Claim, reason: str, seconds: int) -> None:
        async with self._database.write() as session:
            row = await self._still_open(session, claim.operation)
            if row is not None:
                row.state, row.error = "unknown", reason[:MAX_ERROR_CHARS]
                row.next_at = after_seconds(seconds)

    async def _give_up(self, claim: Claim) -> None:
        """It did not happen, as far as Stripe's lists tell, and its key is of no more use."""
        operation = claim.operation
        if not self._is_harmless_twice(claim):
            await self._quarantine(claim, "Stripe forgot its key and does not list it")
            return
        base, _, number = operation.id.partition("~")
        key = f"{base}~{int(number or 1) + 1}"
        async with self._database.write() as session:
            row = await self._still_open(session, operation)
            if row is None:
                return
            row.state, row.error = "rejected", f"It never happened, and is planned again as {key}"
            await plan(
                session,
                operation.kind,
                key,
                operation.organization_id,
                operation.subject_id,
                operation.params,
            )

    async def _quarantine(self, claim: Claim, reason: str) -> None:
        operation = claim.operation
        async with self._database.write() as session:
            row = await self._still_open(session, operation)
            if row is None:
                return
            row.state, row.error = "quarantined", reason[:MAX_ERROR_CHARS]
            await self._kinds[operation.kind].doubted(session, operation, reason)
            await alarm(
                session,
                "payment_in_doubt",
                f"It is not known whether Stripe did {operation.id} ({operation.kind}): {reason}. "
                "Look for it at Stripe; it is not tried again.",
                {"operation_id": operation.id, "kind": operation.kind},
                subject=operation.id,
            )

    def _is_harmless_twice(self, claim: Claim) -> bool:
        return self._kinds[claim.operation.kind].is_harmless_twice

    async def _still_open(
        self, session: AsyncSession, operation: Operation
    ) -> StripeOperation | None:
        """The locked row, unless another process, or a person, has brought it to its end."""
        await lock_account(session, operation.organization_id, self._currency)
        row = await locked(session, operation.id)
        return row if row.state in OPEN_STATES else None


def _wait(claim: Claim) -> int:
    return backoff_seconds(claim.num_attempts, LONGEST_WAIT_SECONDS)
