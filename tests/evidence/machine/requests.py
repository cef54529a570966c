"""What clients do: ask, be refused, get tokens, leave; and what becomes of it, crashes included."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    precondition,
    rule,
)
from sqlalchemy.exc import IntegrityError

from app.billing import holds, posting
from app.billing.prices import PriceTable
from app.billing.rating import Settlement, decoder_worst_case, rate
from app.metering.journal import read_unsettled
from app.metering.records import AdmitRecord, FinishRecord, Usage, use_of
from app.metering.segments import MAGIC, PREFIX, segment_numbers, segment_path
from runtime.protocol import FinishReason, SequenceOutput
from tests.evidence import model
from tests.evidence.machine.base import ENDPOINTS, KEYS, Base, Running, organizations, small


class Whole(NamedTuple):
    """A request from its admission to its end. `wanted`: organization, key, endpoint, and how
    long its prompt is. `tokens`: of each step."""

    wanted: tuple[str, str, str, int]
    tokens: list[int]
    num_cached: int
    reason: FinishReason


whole_requests = st.builds(
    Whole,
    wanted=st.tuples(organizations, st.sampled_from(KEYS), st.sampled_from(ENDPOINTS), small),
    tokens=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    num_cached=small,
    reason=st.sampled_from(["stop", "length", "abort", "error"]),
)


class Requests(Base):
    """Requests, settlements and crashes."""

    @rule(
        organization=organizations,
        key=st.sampled_from(KEYS),
        endpoint=st.sampled_from(ENDPOINTS),
        num_prompt_tokens=small,
        max_tokens=st.integers(1, 20),
        num_choices=st.integers(1, 2),
    )
    def admit(
        self,
        organization: str,
        key: str,
        endpoint: str,
        num_prompt_tokens: int,
        max_tokens: int,
        num_choices: int,
    ) -> None:
        self._admit(organization, key, endpoint, num_prompt_tokens, max_tokens, num_choices)

    def _admit(
        self,
        organization: str,
        key: str,
        endpoint: str,
        num_prompt_tokens: int,
        max_tokens: int,
        num_choices: int = 1,
    ) -> str | None:
        """The request's id, unless it is refused; the model must agree."""
        request_id = self.name("req")
        started_at_ns = int(self.now.timestamp()) * 10**9
        rates = self.prices.rates(endpoint, "standard", num_prompt_tokens, started_at_ns)
        amount = decoder_worst_case(rates, num_prompt_tokens, max_tokens, num_choices)
        wanted = holds.HoldRequest(request_id, organization, amount, key, endpoint)
        with self.engine.begin() as connection:
            refused = holds.take_holds(connection, [wanted], self.journal.id, "usd")
        why = self.account(organization).hold(request_id, amount, key, endpoint, self.now)
        assert bool(refused) == bool(why), (refused, why)
        if why:
            return None
        record = AdmitRecord(
            request_id=request_id,
            organization_id=organization,
            api_key_id=key,
            api_key_name=f"name of {key}",
            endpoint_name=endpoint,
            version_number=1,
            route="/v1/completions",
            kind="decoder",
            service_class="standard",
            price_book_id=rates.book_id,
            started_at_ns=started_at_ns,
            num_prompt_tokens=num_prompt_tokens,
            num_choices=num_choices,
        )
        self.journal.admit(record)
        self.running[request_id] = Running(record, rates, max_tokens)
        return request_id

    @rule(asked=st.lists(whole_requests, min_size=1, max_size=5), is_settled=st.booleans())
    def serve(self, asked: list[Whole], is_settled: bool) -> None:
        """Whole requests at once."""
        for whole in asked:
            request_id = self._admit(*whole.wanted, sum(whole.tokens) + 3)
            if request_id is None:
                continue
            for count in whole.tokens[:-1]:
                self._step(request_id, 0, count, whole.num_cached, None)
            self._step(request_id, 0, whole.tokens[-1], whole.num_cached, whole.reason)
        if is_settled:
            self._post(list(self.pending.values()))

    def _pick(self, at: int) -> str:
        return sorted(self.running)[at % len(self.running)]

    @precondition(lambda self: self.running)
    @rule(
        at=small,
        choice=st.integers(0, 1),
        num_tokens=st.integers(0, 6),
        num_cached=st.integers(0, 25),
        reason=st.sampled_from([None, None, "stop", "length", "abort", "error"]),
    )
    def step(
        self, at: int, choice: int, num_tokens: int, num_cached: int, reason: FinishReason | None
    ) -> None:
        request_id = self._pick(at)
        running = self.running[request_id]
        choice %= running.tally.admitted.num_choices
        if choice not in running.tally.finish_reasons:
            self._step(request_id, choice, num_tokens, num_cached, reason)

    def _step(
        self,
        request_id: str,
        choice: int,
        num_tokens: int,
        num_cached: int,
        reason: FinishReason | None,
    ) -> None:
        """A step of one sequence is durable, then delivered; the last one queues its settlement."""
        running = self.running[request_id]
        num_tokens = min(num_tokens, running.tokens_left[choice])
        running.tokens_left[choice] -= num_tokens
        output = SequenceOutput(
            request_id=request_id,
            choice=choice,
            token_ids=[1] * num_tokens,
            text="",
            num_cached_tokens=num_cached,
            device_ns=1_000,
            finish_reason=reason,
        )
        self.do(self.journal.commit_step([output]))
        running.tally.add(use_of(output), int(self.now.timestamp()) * 10**9)
        running.delivered += num_tokens
        self.delivered[request_id] = running.delivered
        if running.tally.is_finished:
            self._end(request_id, *running.tally.outcome())

    @precondition(lambda self: self.running)
    @rule(at=small)
    def fail(self, at: int) -> None:
        """By our fault, which only the journal's end record tells."""
        request_id = self._pick(at)
        self.journal.note_finish(FinishRecord(request_id, 1, "failed", "internal_error"))
        self._end(request_id, "failed", "internal_error")

    def _end(self, request_id: str, outcome: Any, reason: str) -> None:
        running = self.running.pop(request_id)
        usage = running.tally.usage(outcome, reason, int(self.now.timestamp()) * 10**9)
        self.pending[request_id] = rate(usage, running.rates)

    @precondition(lambda self: self.running)
    @rule(at=small)
    def void(self, at: int) -> None:
        """A request that never started, though its hold was taken."""
        request_id = self._pick(at)
        running = self.running[request_id]
        if running.tally.has_run or running.tally.finish_reasons:
            return
        del self.running[request_id]
        with self.engine.begin() as connection:
            holds.void_holds(connection, [request_id, request_id, "req_unknown"])
        account = self.accounts[running.tally.admitted.organization_id]
        account.free(request_id)
        account.calm()
        self.journal.settled([request_id])

    @precondition(lambda self: self.pending)
    @rule(num=st.integers(1, 8), is_repeated=st.booleans())
    def settle(self, num: int, is_repeated: bool) -> None:
        batch = list(self.pending.values())[:num]
        self._post(batch)
        if is_repeated:
            with pytest.raises(IntegrityError), self.engine.begin() as connection:
                posting.post_settlements(connection, batch)
            with self.engine.begin() as connection:
                assert posting.unrecorded(connection, batch) == []

    def _post(self, batch: list[Settlement]) -> None:
        with self.engine.begin() as connection:
            posting.post_settlements(connection, batch)
        self._settled(batch)

    def _settled(self, batch: list[Settlement]) -> None:
        by_account: dict[str, int] = {}
        for settlement in batch:
            amount = _expected(settlement.usage, self.prices)
            admitted = settlement.usage.admitted
            account = self.account(admitted.organization_id)
            account.free(settlement.request_id, amount)
            by_account[admitted.organization_id] = (
                by_account.get(admitted.organization_id, 0) + amount
            )
            self.pending.pop(settlement.request_id, None)
        for name, amount in by_account.items():
            account = self.accounts[name]
            account.use(amount, self.now)
            account.calm()
        self.journal.settled([settlement.request_id for settlement in batch])

    @rule(share=st.floats(0, 1))
    def crash(self, share: float = 1.0) -> None:
        """The machine stops, with all that was not written, and of what was written but not
        synced all but a share; the next process recovers."""
        old, number = self.journal, self.journal_number + 1
        fresh = self.directory / f"journal{number}"
        shutil.copytree(old.directory, fresh)
        _tear(fresh, share)
        self.do(old.close())
        shutil.rmtree(old.directory)
        before = {usage.admitted.request_id for usage in read_unsettled(fresh).usages}
        usages = self._open_journal(number)
        assert {usage.admitted.request_id for usage in usages} == before
        self.running.clear()
        self.pending.clear()
        found = []
        for usage in usages:
            book = self.prices.book(usage.admitted.price_book_id)
            assert book is not None
            found.append(rate(usage, book.rates_of(usage.admitted)))
        with self.engine.begin() as connection:
            fresh_ones = posting.unrecorded(connection, found)
            posting.post_settlements(connection, fresh_ones)
        self._settled(fresh_ones)
        with self.engine.begin() as connection:
            orphans = holds.orphaned_holds(connection, self.journal.id)
            holds.void_holds(connection, orphans)
        for account in self.accounts.values():
            for request_id in list(account.holds):
                account.free(request_id)
                assert request_id in orphans
            account.calm()


def _tear(directory: Path, share: float) -> None:
    """Cuts the last segment somewhere behind its last step, up to which all of it was synced."""
    numbers = segment_numbers(directory)
    if not numbers:
        return
    path = segment_path(directory, numbers[-1])
    data = path.read_bytes()
    offset = synced = len(MAGIC)
    while offset + PREFIX.size <= len(data):  # its end may have been torn by a crash before
        length, _ = PREFIX.unpack_from(data, offset)
        start, offset = offset, offset + PREFIX.size + length
        if offset <= len(data) and b"step" in data[start : start + PREFIX.size + 8]:
            synced = offset
    path.write_bytes(data[: synced + round((len(data) - synced) * share)])


def _expected(usage: Usage, prices: PriceTable) -> int:
    """What a request costs by its counts, the items of its book and the policy, by hand."""
    book = prices.book(usage.admitted.price_book_id)
    assert book is not None
    items = {i.dimension: i for i in book.items if i.service_class == "standard"}
    counts = {
        "input": usage.input_tokens,
        "cached_input": usage.cached_tokens,
        "output": usage.output_tokens,
        "request": 1,
    }
    by_default = "billed" if usage.outcome in ("completed", "cancelled") else "waived"
    amount = 0
    for name, count in counts.items():
        told = book.policy.get(f"{usage.outcome}.{name}") or book.policy.get(usage.outcome)
        if (told or by_default) == "billed":
            amount += model.line(count, items[name].price_nano, items[name].unit_scale)
    return amount
