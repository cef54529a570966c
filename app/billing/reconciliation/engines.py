"""The engines' own counters against what was metered of their answers, worker by worker.

A worker counts for itself and says so once a second; the gateway counts what passes through it
and bills by that alone. While work is under way the two are compared with those of the run
before: each side must have reached by now what the other had then. At rest they must be equal.
"""

from collections.abc import Sequence

import msgspec

from app.billing.reconciliation.check import Check, Difference, Subject, Unit

REST_NS = 3 * 10**9  # without a frame, after which a worker's counters are its last word
ROUNDING_NS = 1_000  # of device time in one run, lost or won by sharing it among requests


class EngineCounts(msgspec.Struct, frozen=True):
    """Since the worker started. Device time is in nanoseconds."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    device_ns: int = 0

    def plus(self, other: "EngineCounts") -> "EngineCounts":
        return EngineCounts(
            *(getattr(self, name) + getattr(other, name) for name in self.__struct_fields__)
        )


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as it is now. `undelivered` reached the gateway and went no further. A worker
    whose requests failed may have worked for them without telling: `num_failed`."""

    id: str  # of the replica and its start: a new process counts from zero
    name: str
    engine: EngineCounts
    delivered: EngineCounts
    undelivered: EngineCounts
    num_failed: int
    num_runs: int
    is_resting: bool

    @property
    def received(self) -> EngineCounts:
        return self.delivered.plus(self.undelivered)


_TITLES: dict[str, tuple[str, str, Unit]] = {
    "output_tokens": ("Output tokens", "tokens that engines made", "count"),
    "prompt_tokens": ("Prompt tokens", "tokens that engines read", "count"),
    "cached_tokens": ("Cached tokens", "tokens that engines found in their cache", "count"),
    "requests": ("Requests", "requests that engines ran", "count"),
    "device_ns": ("Device time", "time that engines were at work, to the millisecond", "ms"),
}


def check_engines(states: Sequence[EngineState], before: Sequence[EngineState]) -> list[Check]:
    """One check for each thing counted. `before` is how things stood a run ago."""
    earlier = {state.id: state for state in before}
    return [_check(field, states, earlier) for field in _TITLES]


def _check(field: str, states: Sequence[EngineState], earlier: dict[str, EngineState]) -> Check:
    title, what, unit = _TITLES[field]
    subject = Subject(
        name=f"engine_{field.removesuffix('_ns')}",
        title=f"{title}: engines = metered",
        description=f"The {what}, by their own counters since they started, against what was "
        "metered of their answers.",
        left_label="Engines",
        right_label="Metered",
        unit=unit,
    )
    if not states:
        return subject.not_compared("No model is running.")
    found: list[Difference] = []
    left = right = num_undelivered = num_untold = num_under_way = 0
    for state in states:
        engine, received = getattr(state.engine, field), getattr(state.received, field)
        tolerance = ROUNDING_NS * (state.num_runs + 1) if field == "device_ns" else 0
        wrong = _difference(field, state, earlier.get(state.id), tolerance)
        if wrong is not None:
            found.append(Difference(state.name, *wrong))
            left, right = left + engine, right + received
            continue
        # What explains the rest is told beside the numbers, not as a difference between them.
        num_undelivered += getattr(state.undelivered, field)
        gap = engine - received
        if state.is_resting and gap > tolerance:
            num_untold += gap
        elif not state.is_resting:
            num_under_way += abs(gap)
        left, right = left + received, right + received
    scale = 1_000_000 if unit == "ms" else 1
    note = _note(len(states), *(n // scale for n in (num_undelivered, num_untold, num_under_way)))
    if unit == "ms":
        found = [Difference(d.name, d.left // scale, d.right // scale, d.note) for d in found]
    return subject.compared(left // scale, right // scale, found, note=note)


def _difference(
    field: str, state: EngineState, before: EngineState | None, tolerance: int
) -> tuple[int, int, str] | None:
    """What the engine counted, what was received, and why both cannot be true."""
    engine, received = getattr(state.engine, field), getattr(state.received, field)
    excess = engine - received
    if state.is_resting:
        if excess < -tolerance:
            return engine, received, "more was metered than the engine counted"
        if excess > tolerance and not state.num_failed:
            return engine, received, "the engine counted more than arrived"
        return None
    if before is None:
        return None
    was_received, was_counted = getattr(before.received, field), getattr(before.engine, field)
    if was_received > engine + tolerance:
        return engine, was_received, "more was metered a run ago than the engine has counted now"
    if was_counted > received + tolerance and not state.num_failed:
        return was_counted, received, "the engine counted more a run ago than has arrived by now"
    return None


def _note(num_engines: int, num_undelivered: int, num_untold: int, num_under_way: int) -> str:
    parts = [f"{num_engines} running"]
    if num_undelivered:
        parts.append(f"{num_undelivered:,} made but not delivered, nor charged")
    if num_untold:
        parts.append(f"{num_untold:,} made for requests that failed, nor charged")
    if num_under_way:
        parts.append(f"{num_under_way:,} under way")
    return "; ".join(parts) + "."
