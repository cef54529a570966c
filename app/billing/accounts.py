"""The account writer: the one thread of this process that moves money.

Owns its queue, group commit and retries; the SQL is in `posting.py`. Holds are answered first and
need only be atomic; settlements are durable before they count as done.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from app.billing import holds, posting
from app.billing.currency import WrongCurrency
from app.billing.holds import HoldRequest, Refusal
from app.billing.rating import Settlement
from app.billing.refusals import accounts_unavailable, refusal_of, request_too_dear
from app.billing.tables import MAX_HOLD_NANO
from app.core.database import create_writer_engine
from app.core.errors import AppError
from app.core.failpoints import failpoint

MAX_BATCH = 512  # settlements in one transaction
MAX_UNSETTLED = 100_000  # beyond this the database is too far behind to admit more
SETTLE_DELAY_SECONDS = 0.05  # how long settlements may wait for company
RETRY_SECONDS = (0.05, 0.2, 1.0, 5.0)
# Trying again would not help; or it is posted already.
UNPOSTABLE = (IntegrityError, DataError, OverflowError, WrongCurrency)

log = logging.getLogger(__name__)

Waiter = asyncio.Future[None]


class _Hold(NamedTuple):
    request: HoldRequest
    waiter: Waiter


class _Void(NamedTuple):
    request_id: str


class _Flush(NamedTuple):
    waiter: Waiter


_Operation = _Hold | _Void | _Flush | Settlement | None


class _Operations(queue.SimpleQueue[_Operation]):
    """What the thread is to do, for as long as there is one."""

    is_ended = False  # nobody takes any more

    def ask(self, operation: _Hold | _Flush) -> bool:
        """Whether somebody will answer its waiter."""
        self.put(operation)
        return not self.is_ended  # asked last: `end` finds whatever came before it

    def end(self) -> list[Waiter]:
        """Takes no more, and returns who still waits."""
        self.is_ended = True
        left: list[_Operation] = []
        while not self.empty():
            left.append(self.get())
        return [item.waiter for item in left if isinstance(item, _Hold | _Flush)]


class AccountWriter:
    """Start it once; then `hold`, `settle` and `void` may be called from the event loop.

    `on_settled` is called from the writer's thread with the request ids that are durable.
    """

    def __init__(
        self,
        url: str,
        *,
        currency: str = "usd",
        on_settled: Callable[[list[str]], None] = lambda request_ids: None,
    ) -> None:
        self._url = url
        self._currency = currency
        self._on_settled = on_settled
        self._operations = _Operations()
        self._thread: threading.Thread | None = None
        self._writer: _Writer | None = None

    async def start(self, journal_id: str) -> None:
        """Holds are taken in the name of `journal_id`; those that an earlier process left under
        it are what `orphaned_holds` returns."""
        self._loop = asyncio.get_running_loop()
        self._writer = await asyncio.to_thread(
            _Writer, self._url, journal_id, self._currency, self._loop, self._on_settled
        )
        self._thread = threading.Thread(
            target=self._writer.run, args=(self._operations,), name="accounts", daemon=True
        )
        self._thread.start()

    async def close(self) -> None:
        """Settles what is queued, then stops. What the database refuses until then stays in the
        journal for the next start."""
        if self._thread is not None:
            self._operations.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    @property
    def is_alive(self) -> bool:
        """Whether money still moves."""
        return self._thread is not None and not self._operations.is_ended

    @property
    def num_unsettled(self) -> int:
        """Settlements that wait for the database."""
        assert self._writer is not None, "start() has not run"
        return self._writer.num_unsettled

    async def hold(
        self,
        request_id: str,
        organization_id: str,
        amount_nano: int,
        *,
        api_key_id: str = "",
        endpoint_name: str = "",
    ) -> None:
        """Sets money aside, in the account and in the budgets of the organization, the key and
        the endpoint. Raises `PaymentRequired` naming the limit and the shortfall."""
        assert self._writer is not None, "start() has not run"
        if self._writer.num_unsettled + self._operations.qsize() > MAX_UNSETTLED:
            raise accounts_unavailable()
        if amount_nano > MAX_HOLD_NANO:
            raise request_too_dear(amount_nano, self._currency)
        waiter: Waiter = self._loop.create_future()
        request = HoldRequest(request_id, organization_id, amount_nano, api_key_id, endpoint_name)
        await self._ask(_Hold(request, waiter))

    def void(self, request_id: str) -> None:
        """Gives back the hold of a request that did not run, whether or not it was taken yet."""
        self._operations.put(_Void(request_id))

    def settle(self, settlement: Settlement) -> None:
        """Queued. A request settled twice counts once."""
        self._operations.put(settlement)

    async def flush(self) -> None:
        """Returns when everything queued before is durable (or was put off, see the log)."""
        await self._ask(_Flush(self._loop.create_future()))

    async def _ask(self, operation: _Hold | _Flush) -> None:
        if not self._operations.ask(operation):
            operation.waiter.cancel()
            raise accounts_unavailable()
        await operation.waiter

    async def release_orphans(self, known_request_ids: set[str]) -> int:
        """At start, before any request: frees holds of this journal's earlier processes whose
        requests the journal does not know, so never ran. Returns how many."""
        assert self._writer is not None, "start() has not run"
        orphans = await asyncio.to_thread(self._writer.orphans)
        unknown = [request_id for request_id in orphans if request_id not in known_request_ids]
        for request_id in unknown:
            self.void(request_id)
        await self.flush()
        return len(unknown)


class _Writer:
    """The thread's own state: two connections and what is still to be settled."""

    def __init__(
        self,
        url: str,
        journal_id: str,
        currency: str,
        loop: asyncio.AbstractEventLoop,
        on_settled: Callable[[list[str]], None],
    ) -> None:
        # One connection each for the thread's whole life; a lost one is replaced at its next use.
        self._durable = create_writer_engine(url).connect()
        self._atomic = _atomic_engine(url).connect()
        self._journal_id = journal_id
        self._currency = currency
        self._loop = loop
        self._on_settled = on_settled
        self._settlements: list[Settlement] = []
        self._voids: list[str] = []
        self._num_failures = 0
        self._settle_seconds = 0.0

    @property
    def num_unsettled(self) -> int:
        return len(self._settlements)

    def orphans(self) -> list[str]:
        with self._durable.engine.begin() as connection:  # called from another thread
            return holds.orphaned_holds(connection, self._journal_id)

    def run(self, operations: _Operations) -> None:
        """One turn after another. What goes wrong in a turn is told to those who wait for it and
        does not end the thread: settlements stay queued until they are posted."""
        try:
            is_closing = False
            while not is_closing:
                batch = self._collect(operations)
                is_closing = bool(batch) and batch[-1] is None
                try:
                    self._turn(batch, is_closing=is_closing)
                except Exception:
                    log.exception("a turn of the account writer failed")
                    self._give_up(item.waiter for item in batch if isinstance(item, _Hold | _Flush))
        except Exception:
            log.exception("the account writer has stopped; restart the box")
        finally:
            self._give_up(operations.end())
            for connection in (self._durable, self._atomic):
                connection.close()
                connection.engine.dispose()

    def _turn(self, batch: list[_Operation], *, is_closing: bool) -> None:
        asked = [item for item in batch if isinstance(item, _Hold)]
        flushes = [item.waiter for item in batch if isinstance(item, _Flush)]
        self._voids += [item.request_id for item in batch if isinstance(item, _Void)]
        fresh = [item for item in batch if isinstance(item, Settlement)]
        if fresh and not self._settlements:
            self._settle_seconds = max(
                self._settle_seconds, time.monotonic() + SETTLE_DELAY_SECONDS
            )
        self._settlements += fresh
        if asked:
            self._take(asked)
        if flushes or is_closing or self._is_due():
            self._settle_all()
        if flushes:
            self._loop.call_soon_threadsafe(_resolve, dict.fromkeys(flushes))

    def _give_up(self, waiters: Iterable[Waiter]) -> None:
        """Whoever has an answer already keeps it."""
        answers: dict[Waiter, AppError | None] = {
            waiter: accounts_unavailable() for waiter in waiters
        }
        if answers:
            self._loop.call_soon_threadsafe(_resolve, answers)

    def _collect(self, operations: _Operations) -> list[_Operation]:
        """Waits for work, or until what is put off is due; then takes all there is."""
        timeout = None
        if self._settlements or self._voids:
            timeout = max(0.0, self._settle_seconds - time.monotonic())
        batch: list[_Operation] = []
        try:
            batch.append(operations.get(timeout=timeout))
            while batch[-1] is not None:
                batch.append(operations.get_nowait())
        except queue.Empty:
            pass
        return batch

    def _is_due(self) -> bool:
        return bool(self._settlements or self._voids) and time.monotonic() >= self._settle_seconds

    def _take(self, asked: list[_Hold]) -> None:
        """Answers every hold. Where money is short, pending settlements may free some: a client
        that asks again right after an answer must not be refused for its own last request."""
        answers: dict[Waiter, AppError | None] = {}
        try:
            refused = self._attempt(asked, answers)
            if refused and (self._settlements or self._voids):
                given_up = set(self._voids)  # a hold taken after its void would stay for good
                self._settle_all()
                again = [hold for hold, _ in refused if hold.request.request_id not in given_up]
                refused = [
                    (hold, refusal)
                    for hold, refusal in refused
                    if hold.request.request_id in given_up
                ] + self._attempt(again, answers)
            for hold, refusal in refused:
                answers[hold.waiter] = refusal_of(hold.request, refusal)
        except Exception:
            log.exception("holds could not be taken")
            unanswered = [hold for hold in asked if hold.waiter not in answers]
            # Some may have been: a connection can be lost after its commit has taken effect.
            self._voids += [hold.request.request_id for hold in unanswered]
            answers.update({hold.waiter: accounts_unavailable() for hold in unanswered})
        self._loop.call_soon_threadsafe(_resolve, answers)

    def _attempt(
        self, asked: list[_Hold], answers: dict[Waiter, AppError | None]
    ) -> list[tuple[_Hold, Refusal]]:
        """Answers those whose money is set aside, and returns the others."""
        requests = [hold.request for hold in asked]
        try:
            refused = self._take_holds(requests)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            refused = self._take_holds(requests)  # on a new connection
        answers.update(
            {hold.waiter: None for hold in asked if hold.request.request_id not in refused}
        )
        return [
            (hold, refused[hold.request.request_id])
            for hold in asked
            if hold.request.request_id in refused
        ]

    def _take_holds(self, requests: list[HoldRequest]) -> dict[str, Refusal]:
        failpoint("accounts.before_hold")
        with _transaction(self._atomic) as connection:
            refused = holds.take_holds(connection, requests, self._journal_id, self._currency)
            failpoint("accounts.before_hold_commit")
        failpoint("accounts.after_hold_commit")
        return refused

    def _settle_all(self) -> None:
        """Everything pending, a batch at a time. When the database fails, the rest is put off."""
        try:
            if self._voids:
                with _transaction(self._durable) as connection:
                    holds.void_holds(connection, self._voids)
                    failpoint("accounts.before_void_commit")
                failpoint("accounts.after_void_commit")
                self._voids = []
            while self._settlements:
                batch = self._settlements[:MAX_BATCH]
                settled = self._post(batch)
                self._settlements = self._settlements[MAX_BATCH:]
                self._on_settled([settlement.request_id for settlement in settled])
            self._num_failures = 0
        except Exception:
            delay = RETRY_SECONDS[min(self._num_failures, len(RETRY_SECONDS) - 1)]
            self._num_failures += 1
            self._settle_seconds = time.monotonic() + delay
            log.exception("settling failed; %d wait", len(self._settlements))

    def _post(self, batch: Sequence[Settlement]) -> Sequence[Settlement]:
        """Returns what is in the database now. Settlements that are there already, as after a
        crash, are skipped; one that the database will never take is left to the journal, so
        that it cannot hold up the others."""
        try:
            with _transaction(self._durable) as connection:
                posting.post_settlements(connection, batch)
                failpoint("accounts.before_settle_commit")
        except UNPOSTABLE:
            return [settlement for settlement in batch if self._is_posted(settlement)]
        failpoint("accounts.after_settle_commit")
        return batch

    def _is_posted(self, settlement: Settlement) -> bool:
        try:
            with _transaction(self._durable) as connection:
                posting.post_settlements(connection, posting.unrecorded(connection, [settlement]))
                failpoint("accounts.before_lone_settle_commit")
        except UNPOSTABLE:
            log.exception("%s cannot be settled and stays in the journal", settlement.event_id)
            return False
        return True


@contextmanager
def _transaction(connection: Connection) -> Generator[Connection]:
    with connection.begin():
        yield connection


def _atomic_engine(url: str) -> Engine:
    """Its commits on SQLite do not wait for the disk: a hold that a power cut takes away belonged
    to a request which it took away as well."""
    engine = create_writer_engine(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def on_connect(connection: object, _: object) -> None:
            connection.execute("PRAGMA synchronous=NORMAL")  # type: ignore[attr-defined]

    return engine


def _resolve(answers: dict[Waiter, AppError | None]) -> None:
    for waiter, error in answers.items():
        if waiter.done():  # whoever waited was cancelled, and voids the hold
            continue
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
