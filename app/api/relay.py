"""Takes a request through hold, replica and settlement, for every kind of program.

Owns each request from its admission to its settlement, in tasks of its own: a client that goes
away ends the waiting, never the accounting. What the caller is told is made here as well, by the
handler's `answer`, before the request is settled: nobody pays for an answer that could not be made.
HTTP is `openai.py`'s and `predict.py`'s; how a request ends without an answer is in `endings.py`,
what is charged when in `metering/records.py` and `billing/rating.py`.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from app.api.call import Call
from app.api.embedding import Answer as EmbeddingAnswer
from app.api.embedding import Embedding
from app.api.endings import Ending, client_left, given_up, overdue, timed_out, unanswered
from app.api.execution import Answer, Execution
from app.api.held_time import max_device_ms
from app.api.prediction import Answer as PredictionAnswer
from app.api.prediction import Prediction
from app.api.settling import Settling
from app.billing.accounts import AccountWriter
from app.billing.prices import PriceTable, Rates
from app.billing.rating import (
    decoder_worst_case,
    embedder_worst_case,
    rate,
    tensor_worst_case,
)
from app.core.errors import AppError, PaymentRequired, Unavailable
from app.core.failpoints import failpoint
from app.deployments.failed_runs import device_ns_of
from app.metering.journal import Journal
from app.metering.meters import Meters
from app.metering.records import Tally, Usage, use_of
from runtime.protocol import Embed, Embedded, Generate, Predict, Predicted

LATE_SECONDS = 60.0  # for the end of a run whose caller has been told that it took too long
HOLD_SECONDS = 30.0  # a database that does not answer for so long is down

log = logging.getLogger(__name__)
T = TypeVar("T")


class Relay:
    """One per process. Call `recover` before the first request and `close` after the last."""

    def __init__(
        self,
        journal: Journal,
        prices: PriceTable,
        accounts: AccountWriter,
        *,
        timeout_seconds: float,
        meters: Meters | None = None,
    ) -> None:
        self._meters = meters or Meters()
        self._settling = Settling(journal, accounts, self._meters)
        self._journal = journal
        self._prices = prices
        self._accounts = accounts
        self._timeout_seconds = timeout_seconds
        self._running: set[asyncio.Task[Any]] = set()

    async def recover(self, usages: list[Usage]) -> None:
        """Settles what an earlier process left in the journal and frees the holds it left."""
        for usage in usages:
            book = self._prices.book(usage.admitted.price_book_id)
            if book is None:
                log.error("%s: its price book is gone", usage.admitted.request_id)
                continue
            self._accounts.settle(rate(usage, book.rates_of(usage.admitted)))
        await self._accounts.flush()
        failpoint("relay.after_recovered_settled")
        known = {usage.admitted.request_id for usage in usages}
        num_freed = await self._accounts.release_orphans(known)
        if usages or num_freed:
            log.warning(
                "settled %d requests of an earlier run (%d of them lost); freed %d other holds",
                len(usages),
                sum(usage.outcome == "lost" for usage in usages),
                num_freed,
            )

    async def close(self) -> None:
        """Returns when every request is settled; the fleet, closed before, has ended them all."""
        while self._running:
            await asyncio.wait(self._running)

    async def settled(self) -> None:
        """Returns when every request that has ended is in the database."""
        await self._accounts.flush()

    # --- decoders -------------------------------------------------------------------------

    def generate(self, call: Call, request: Generate, answer: Answer) -> Execution:
        """`started` of what is returned tells once the request runs, or raises what its replica
        or its account has against it."""
        execution = Execution(call.request_id, call.target.link, answer, is_stream=call.is_stream)
        self._own(self._generate(execution, call, request))
        return execution

    async def _generate(self, execution: Execution, call: Call, request: Generate) -> None:
        """From admission to settlement. Never raises: its execution tells what happened."""
        loop = asyncio.get_running_loop()
        expiry = loop.call_later(self._timeout_seconds, self._expire, execution)
        try:
            tally, rates = await self._admit(execution, call, request)
            await self._follow(execution, tally, rates)
        except AppError as error:
            execution.fail(error)
        except Exception:
            log.exception("%s failed", call.request_id)
            execution.fail(AppError("Something went wrong inside the box; this costs nothing."))
        finally:
            expiry.cancel()

    async def _admit(
        self, execution: Execution, call: Call, request: Generate
    ) -> tuple[Tally, Rates]:
        """Prepares, holds the worst case, records, starts."""
        link = call.target.link
        prepared = await link.prepare(request)
        num_prompt_tokens = prepared.num_prompt_tokens
        rates = self._rates(call, num_prompt_tokens)
        worst = decoder_worst_case(
            rates, num_prompt_tokens, prepared.max_tokens, request.num_choices
        )
        try:
            await self._hold(call, worst)
            if execution.is_cancelled:
                self._accounts.void(call.request_id)
                raise client_left()
        except AppError:
            link.cancel(call.request_id)
            raise
        record = call.admit_record(
            rates, num_prompt_tokens=num_prompt_tokens, num_choices=request.num_choices
        )
        failpoint("relay.before_admit")
        self._journal.admit(record)
        link.start(call.request_id)
        failpoint("relay.after_start")
        tally = Tally(record)
        execution.start(tally)
        return tally, rates

    def _rates(self, call: Call, num_prompt_tokens: int = 0) -> Rates:
        """Of the book in force; its prices may depend on the prompt's length and the hour."""
        return self._prices.rates(
            call.target.endpoint_name, call.service_class, num_prompt_tokens, call.started_at_ns
        )

    async def _hold(self, call: Call, amount_nano: int) -> None:
        organization_id = call.principal.organization_id
        try:
            async with asyncio.timeout(HOLD_SECONDS):
                await self._accounts.hold(
                    call.request_id,
                    organization_id,
                    amount_nano,
                    api_key_id=call.principal.api_key_id,
                    endpoint_name=call.target.endpoint_name,
                )
        except PaymentRequired as error:
            self._meters.refuse(error.code)
            raise
        except TimeoutError:
            self._accounts.void(call.request_id)  # it may still be taken
            raise Unavailable(
                "The box cannot reserve the money for this request at the moment.",
                code="accounts_unavailable",
                retry_after_seconds=5,
            ) from None

    async def _follow(self, execution: Execution, tally: Tally, rates: Rates) -> None:
        """Counts what the replica sends and hands on what its answer makes of it."""
        try:
            async for outputs in execution.link.outputs(execution.request_id):
                at_ns = time.time_ns()
                for output in outputs:
                    tally.add(use_of(output), at_ns)
                try:
                    body = execution.made_of(outputs)
                except Exception as error:  # noqa: BLE001 - it is logged, and what the caller gets
                    body = b""
                    await self._give_up(execution, unanswered(execution.request_id, error))
                if tally.is_finished:
                    await self._conclude(execution, tally, rates, body)
                    return
                execution.push(body)
        except AppError as error:
            self._settling.settle(tally, rates, "failed", error.code)
            raise
        except Exception:
            self._settling.settle(tally, rates, "failed", "internal_error")
            raise
        raise AssertionError("the replica's outputs ended before the request did")

    async def _conclude(
        self, execution: Execution, tally: Tally, rates: Rates, body: bytes
    ) -> None:
        """Settles as was decided, else by how the sequences ended. The settlement is queued before
        the last of the answer is handed on, so that whoever acts on it finds the money freed."""
        outcome, reason = tally.outcome()
        has_left = outcome == "cancelled" and execution.is_cancelled
        if execution.ending is None and outcome != "completed" and not has_left:
            execution.push(body)
            await self._give_up(execution, given_up(tally, is_stream=execution.is_stream))
        if execution.ending is not None:
            self._settling.settle(tally, rates, execution.ending.outcome, execution.ending.reason)
            return
        self._settling.settle(tally, rates, outcome, reason)
        failpoint("relay.before_last_output")
        execution.push(body)
        if has_left:
            execution.fail(client_left())
        else:
            execution.end()

    def _expire(self, execution: Execution) -> None:
        """At the deadline. What the replica completes nevertheless is no answer any more."""
        seconds = self._timeout_seconds
        if not execution.is_started:
            execution.cancel()
            execution.fail(timed_out(seconds))
        elif execution.ending is None:
            ending = overdue(execution.tally, seconds, is_stream=execution.is_stream)
            execution.give_up(ending)
            self._own(self._settling.tell(execution, ending))

    async def _give_up(self, execution: Execution, ending: Ending) -> None:
        execution.give_up(ending)
        await self._settling.tell(execution, ending)

    # --- tensor programs ------------------------------------------------------------------

    def predict(self, call: Call, request: Predict, answer: PredictionAnswer[T]) -> Prediction[T]:
        """What is returned, awaited, gives what `answer` makes of the outputs and their usage."""
        prediction = Prediction[T](call.request_id, call.target.link)
        prediction.answer = self._own(self._predict(prediction, call, request, answer))
        return prediction

    async def _predict(
        self,
        prediction: Prediction[T],
        call: Call,
        request: Predict,
        answer: PredictionAnswer[T],
    ) -> T:
        rates = self._rates(call)
        held_ms = max_device_ms(call.target, request, self._timeout_seconds)
        await self._hold(call, tensor_worst_case(rates, held_ms))
        try:
            if prediction.is_cancelled:
                raise client_left()
            call = call.renewed()
        except AppError:
            self._accounts.void(call.request_id)
            raise
        prediction.link = call.target.link
        tally = Tally(call.admit_record(rates, max_device_ms=held_ms))
        self._journal.admit(tally.admitted)
        running = self._own(call.target.link.predict(request))
        await asyncio.wait({running}, timeout=self._timeout_seconds)
        if not running.done():
            call.target.link.withdraw(call.request_id)
            self._own(self._settle_late(running, tally, rates))
            raise timed_out(self._timeout_seconds)
        try:
            predicted = running.result()
            told, usage = await self._settling.answered(answer, predicted, tally)
        except AppError as error:
            if prediction.is_cancelled and error.code == "cancelled":
                self._settling.settle(tally, rates, "cancelled", "abort")
            else:
                self._settle_run(tally, rates, error.code, device_ns_of(error))
            raise
        except Exception:
            self._settling.settle(tally, rates, "failed", "internal_error")
            raise
        if usage.excess_device_ms:
            log.warning(
                "%s: %s took %d ms of device time, of which the hold of %d ms does not cover %d",
                *(call.request_id, call.target.endpoint_name, -(-tally.device_ns // 1_000_000)),
                *(held_ms, usage.excess_device_ms),
            )
        self._settling.post(rate(usage, rates))
        if isinstance(told, Ending):
            raise told.error
        return told

    async def _settle_late(
        self, running: asyncio.Task[Predicted], tally: Tally, rates: Rates
    ) -> None:
        """Of a request that is out of time. What has begun is finished, and paid for."""
        device_ns = 0
        try:
            async with asyncio.timeout(LATE_SECONDS):
                device_ns = (await running).device_ns
        except AppError as error:
            device_ns = device_ns_of(error)
        except TimeoutError:
            log.warning("%s: no end is told of its run", tally.admitted.request_id)
        except Exception:
            log.exception("%s failed", tally.admitted.request_id)
        self._settle_run(tally, rates, "timeout", device_ns)

    def _settle_run(self, tally: Tally, rates: Rates, reason: str, device_ns: int) -> None:
        """Of a prediction without an answer: its run is paid for where that is not our fault."""
        self._settling.settle(
            tally, rates, "cancelled" if device_ns else "failed", reason, device_ns
        )

    # --- embedders ------------------------------------------------------------------------

    def embed(self, call: Call, request: Embed, answer: EmbeddingAnswer) -> Embedding:
        """What is returned, awaited, gives what `answer` makes of the vectors and their usage."""
        embedding = Embedding(call.request_id, call.target.link)
        embedding.answer = self._own(self._embed(embedding, call, request, answer))
        return embedding

    async def _embed(
        self, embedding: Embedding, call: Call, request: Embed, answer: EmbeddingAnswer
    ) -> bytes:
        num_tokens = (await embedding.link.prepare(request)).num_prompt_tokens
        rates = self._rates(call, num_tokens)
        try:
            await self._hold(call, embedder_worst_case(rates, num_tokens))
            if embedding.is_cancelled:
                self._accounts.void(call.request_id)
                raise client_left()
        except AppError:
            embedding.link.cancel(call.request_id)
            raise
        tally = Tally(call.admit_record(rates, num_prompt_tokens=num_tokens))
        self._journal.admit(tally.admitted)
        embedding.link.start(call.request_id)
        try:
            embedded = await self._embedded_in_time(embedding)
            if embedded.data:
                told, usage = await self._settling.answered(answer, embedded, tally)
            else:
                told = Ending("cancelled", "abort", client_left())
                num_ran = sum(embedded.num_tokens)
                usage = await self._settling.ended(tally, embedded.device_ns, told, num_ran)
        except AppError as error:
            if embedding.is_cancelled and error.code == "cancelled":
                self._settling.settle(tally, rates, "cancelled", "abort")
            else:
                self._settling.settle(tally, rates, "failed", error.code)
            raise
        except Exception:
            self._settling.settle(tally, rates, "failed", "internal_error")
            raise
        self._settling.post(rate(usage, rates))
        if isinstance(told, Ending):
            raise told.error
        return told

    async def _embedded_in_time(self, embedding: Embedding) -> Embedded:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await embedding.link.embedded(embedding.request_id)
        except TimeoutError:
            embedding.cancel()
            raise timed_out(self._timeout_seconds) from None

    # --- all ------------------------------------------------------------------------------

    def _own(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._disown)
        return task

    def _disown(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked has it, or has gone
