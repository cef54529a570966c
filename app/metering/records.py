"""What the journal holds: who asked, what was used step by step, and how it ended.

Owns the records' form on disk and `Tally`, which adds them up the same way while a request
runs and in recovery. Prices are not known here.
"""

from typing import Literal

import msgspec

from runtime.protocol import FinishReason, Kind, SequenceOutput, ServiceClass

Outcome = Literal["completed", "cancelled", "failed", "lost"]
OVER_HOLD = "over_hold"  # finish reason: answered, but some of its device time is not charged


class Record(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One journal record. On disk an array whose first member is the class's name; fields are
    only ever added at the end, with a default."""


class AdmitRecord(Record, frozen=True, tag="admit"):
    """A request was let in: whose it is, what it asked for and the price book it is bound to."""

    request_id: str
    organization_id: str
    api_key_id: str
    api_key_name: str
    endpoint_name: str
    version_number: int
    route: str
    kind: Kind
    service_class: ServiceClass
    price_book_id: str
    started_at_ns: int  # wall clock
    num_prompt_tokens: int = 0
    num_choices: int = 1
    max_device_ms: int = 0  # what the hold covers; no more is ever charged
    is_stream: bool = True  # the caller gets output as it is made


class SequenceUse(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one sequence."""

    request_id: str
    choice: int
    num_tokens: int
    num_cached_tokens: int
    device_ns: int
    finish_reason: FinishReason | None = None


class StepRecord(Record, frozen=True, tag="step"):
    """Everything one engine step delivers, of all the requests in it."""

    at_ns: int
    uses: list[SequenceUse]


class FinishRecord(Record, frozen=True, tag="finish"):
    """How a request ended. `device_ns` adds to what its steps used. `num_prompt_tokens` is given
    where fewer ran than were admitted."""

    request_id: str
    at_ns: int
    outcome: Outcome
    finish_reason: str
    device_ns: int = 0
    num_prompt_tokens: int | None = None


class SettledRecord(Record, frozen=True, tag="settled"):
    """These requests are in the database; recovery need not look at them."""

    request_ids: list[str]


AnyRecord = AdmitRecord | StepRecord | FinishRecord | SettledRecord


def use_of(output: SequenceOutput) -> SequenceUse:
    """The countable part of what a worker sent: tokens are counted, not believed, and those of
    an output that no caller is shown are not counted."""
    return SequenceUse(
        output.request_id,
        output.choice,
        0 if output.finish_reason == "refused" else len(output.token_ids),
        output.num_cached_tokens,
        output.device_ns,
        output.finish_reason,
    )


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one request used in the end, before prices."""

    admitted: AdmitRecord
    outcome: Outcome
    finish_reason: str
    input_tokens: int  # not found in the cache
    cached_tokens: int
    output_tokens: int
    device_ms: int
    excess_device_ms: int = 0  # beyond the hold; never charged
    finished_at_ns: int
    first_token_ns: int | None  # after the start


class Tally:
    """The running count of one request."""

    def __init__(self, admitted: AdmitRecord) -> None:
        self.admitted = admitted
        self.num_prompt_tokens = admitted.num_prompt_tokens
        self.num_output_tokens = 0
        self._cached_tokens: dict[int, int] = {}  # by choice, as first reported
        self.device_ns = 0
        self.first_token_at_ns: int | None = None
        self.finish_reasons: dict[int, FinishReason] = {}

    def add(self, use: SequenceUse, at_ns: int) -> None:
        self.num_output_tokens += use.num_tokens
        self.device_ns += use.device_ns
        self._cached_tokens.setdefault(use.choice, use.num_cached_tokens)
        if self.first_token_at_ns is None and use.num_tokens:
            self.first_token_at_ns = at_ns
        if use.finish_reason is not None:
            self.finish_reasons[use.choice] = use.finish_reason

    @property
    def num_cached_tokens(self) -> int:
        """Choices share one prompt: what the first of them found in the cache counts for it."""
        first = min(self._cached_tokens, default=0)
        return min(self._cached_tokens.get(first, 0), self.num_prompt_tokens)

    def close(self, end: FinishRecord) -> None:
        """Counts what a request used that tells it at its end, not step by step."""
        self.device_ns += end.device_ns
        if end.num_prompt_tokens is not None:
            self.num_prompt_tokens = min(end.num_prompt_tokens, self.admitted.num_prompt_tokens)

    @property
    def has_run(self) -> bool:
        """False for a request that ended while it was still queued: its prompt is not charged."""
        return self.device_ns > 0 or self.num_output_tokens > 0

    @property
    def is_finished(self) -> bool:
        return len(self.finish_reasons) == self.admitted.num_choices

    def outcome(self) -> tuple[Outcome, str]:
        """How the sequences ended, for a request that nothing else put an end to."""
        if not self.is_finished:
            return "lost", "lost"
        reasons = set(self.finish_reasons.values())
        if "error" in reasons:
            return "failed", "error"
        if "refused" in reasons:
            return "cancelled", "refused"
        if "abort" in reasons:
            return "cancelled", "abort"
        return "completed", self.finish_reasons.get(0, "stop")

    def usage(self, outcome: Outcome, finish_reason: str, at_ns: int) -> Usage:
        """Closes the count. Device time is charged by the millisecond begun, up to its hold; the
        finish reason of an answer that took more says so."""
        admitted = self.admitted
        prompt = self.num_prompt_tokens if self.has_run else 0
        cached = min(self.num_cached_tokens, prompt)
        device_ms = -(-self.device_ns // 1_000_000)
        excess_ms = max(0, device_ms - admitted.max_device_ms) if admitted.max_device_ms else 0
        if excess_ms and outcome == "completed":
            finish_reason = OVER_HOLD
        first = self.first_token_at_ns
        return Usage(
            admitted=admitted,
            outcome=outcome,
            finish_reason=finish_reason[:32],
            input_tokens=prompt - cached,
            cached_tokens=cached,
            output_tokens=self.num_output_tokens,
            device_ms=device_ms - excess_ms,
            excess_device_ms=excess_ms,
            finished_at_ns=max(at_ns, admitted.started_at_ns),
            first_token_ns=None if first is None else max(0, first - admitted.started_at_ns),
        )
