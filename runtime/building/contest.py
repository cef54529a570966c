"""The contest of a program's candidates: they are timed in rounds, one is chosen, all are told.

Timing is `compiling.rounds`', the choice `compiling.choosing`'s; this brings the candidates'
processes to the start, as many at once as memory allows, and puts the outcome into words.
"""

import logging
import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from runtime.building.candidacy import UPLOADED, Candidate, Course, start
from runtime.building.contender_process import ContenderFailure
from runtime.compiling.choosing import DOUBT, Standing, choose
from runtime.compiling.measuring import MARGIN, MakeInputs
from runtime.compiling.rounds import TURN_SECONDS, Measured, Withdrawn, race
from runtime.protocol import CandidateReport
from runtime.proving.tensor_speed import batch_sizes

logger = logging.getLogger("runtime.build")

RACE_SECONDS = 120.0  # of rounds at most, however much is left of the budget

Report = Callable[[float, str], None]


class Outcome(msgspec.Struct, kw_only=True):
    """`measured` is of those that took part, eager perhaps among them. `sizes` had rounds."""

    best: str
    measured: dict[str, Measured]
    standings: dict[str, Standing]
    sizes: list[int]


class Entrant:
    """A candidate's process as a contestant."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate

    def turn(self, size: int, seconds: float) -> list[float]:
        """Raises `Withdrawn` once the candidate has a fate."""
        assert self._candidate.process is not None, "an entrant runs"
        try:
            return self._candidate.process.turn(size, seconds)
        except ContenderFailure as failure:
            self._candidate.drop(failure.fate, failure.reason)
            raise Withdrawn from failure


def hold_contest(
    course: Course,
    eager: Candidate,
    others: Sequence[Candidate],
    make_inputs: MakeInputs,
    room_bytes: int,
    until: float,
    report: Report,
) -> Outcome:
    """Times eager beside the others and chooses. Those that fail get their fate."""
    found = Outcome(best="eager", measured={}, standings={}, sizes=[])
    groups = group(eager, others, room_bytes)
    for index, members in enumerate(groups):
        seconds = (until - time.monotonic()) / (len(groups) - index)

        def tell(done: float, line: str, index: int = index) -> None:
            report((index + done) / len(groups), line)

        _race_group(course, [eager, *members], make_inputs, seconds, tell, found)
        for member in members:
            member.end()
        if eager.fate is not None:
            break
    eager.end()
    eligible = {
        each.name: found.standings[each.name]
        for each in others
        if each.fate is None
        and each.name in found.standings
        and (course.accepts_loss or not each.loses)
    }
    found.best = choose(eligible, {each.name: each.rank for each in others})
    return found


def group(eager: Candidate, others: Sequence[Candidate], room_bytes: int) -> list[list[Candidate]]:
    """Who runs beside eager at once: as many as fit the memory, by what each held at most."""
    groups: list[list[Candidate]] = [[]]
    used = eager.peak_bytes
    for each in others:
        if groups[-1] and used + each.peak_bytes > room_bytes:
            groups.append([])
            used = eager.peak_bytes
        groups[-1].append(each)
        used += each.peak_bytes
    return groups


def _race_group(
    course: Course,
    members: Sequence[Candidate],
    make_inputs: MakeInputs,
    seconds: float,
    report: Report,
    found: Outcome,
) -> None:
    until = time.monotonic() + seconds
    run_ms = dict.fromkeys(batch_sizes(course.max_rows), 0.0)
    batches: dict[int, list[torch.Tensor]] = {size: make_inputs(size) for size in run_ms}
    ready: dict[str, Candidate] = {}
    for member in members:
        report(0.0, f"loading {member.name}")
        try:
            start(course, member, until, lambda _: None)
            assert member.process is not None, "it has just been started"
            member.process.until = until + max(seconds, 60.0)  # a turn is short; this is for hangs
            for size, inputs in batches.items():
                run_ms[size] += max(member.process.hold(size, inputs), TURN_SECONDS * 1e3)
        except ContenderFailure as failure:
            member.drop(failure.fate, failure.reason)
            continue
        ready[member.name] = member
    if "eager" not in ready:
        return
    entrants = {name: Entrant(member) for name, member in ready.items()}
    seconds = min(RACE_SECONDS, until - time.monotonic())
    outcome = race(entrants, run_ms, seconds=seconds, report=report)
    for name, member in ready.items():
        if member.process is not None:
            member.peak_bytes = max(member.peak_bytes, member.process.peak_bytes)
        if name in outcome.measured and name not in found.measured:
            found.measured[name] = outcome.measured[name]
    found.standings |= outcome.standings
    found.sizes = found.sizes or outcome.sizes


# --- what became of each ----------------------------------------------------------------


def report_all(
    course: Course,
    eager: Candidate,
    others: Sequence[Candidate],
    outcome: Outcome,
    known_eager: CandidateReport | None,
) -> list[CandidateReport]:
    """One report each, exactly one chosen. Eager was measured; `known_eager` is the build's report
    of it."""
    base = _report(eager, outcome)
    known_ms = 0.0
    if known_eager is not None and course.manifest.kind == "embedder":
        known_ms = known_eager.device_ms_max  # its build timed the longest run there is
    base = msgspec.structs.replace(base, device_ms_max=max(base.device_ms_max, known_ms))
    # How a row's time grows with its size is known of the program as uploaded alone.
    row_ms = known_eager.row_ms_by_size if known_eager is not None else {}
    is_eager = outcome.best == eager.name
    best = outcome.standings.get(outcome.best)
    reports = [
        msgspec.structs.replace(
            base,
            row_ms_by_size=row_ms,
            is_chosen=is_eager,
            fate="chosen" if is_eager else "slower",
            reason=_eager_reason(eager, others, outcome),
        )
    ]
    for each in others:
        report = _report(each, outcome)
        standing = outcome.standings.get(each.name)
        if each.fate is None:
            _settle(course, each, standing, outcome.best, best)
        # Where it cannot run, eager does.
        slowest = max(report.device_ms_max, base.device_ms_max)
        is_best = each.name == outcome.best
        reports.append(
            msgspec.structs.replace(
                report,
                is_chosen=is_best,
                fate=each.fate,
                reason=each.reason,
                device_ms_max=slowest if is_best else report.device_ms_max,
                row_ms_by_size=row_ms if is_best else {},
            )
        )
    return reports


def _report(candidate: Candidate, outcome: Outcome) -> CandidateReport:
    """The figures alone."""
    measured = outcome.measured.get(candidate.name)
    proof = candidate.proof
    report = CandidateReport(
        name=candidate.name,
        is_chosen=False,
        reason="",
        precision="" if candidate.form.precision == UPLOADED else candidate.form.precision,
        error=proof.error if proof else None,
        top_1_agreement=proof.loss.agreement if proof and candidate.loses else None,
        prepare_seconds=candidate.prepare_seconds,
        memory_bytes=candidate.peak_bytes or None,
    )
    if measured is None:
        return report
    p50_ms = {size: measured.p50_ms(size) for size in measured.runs_ms}
    return msgspec.structs.replace(
        report,
        p50_ms={size: round(ms, 4) for size, ms in p50_ms.items()},
        p99_ms={size: round(measured.p99_ms(size), 4) for size in p50_ms},
        num_runs=measured.num_runs,
        rows_per_second={size: round(1e3 * size / ms, 2) for size, ms in p50_ms.items()},
        device_ms_max=round(measured.max_ms, 4),
    )


def _settle(
    course: Course,
    each: Candidate,
    standing: Standing | None,
    best_name: str,
    best: Standing | None,
) -> None:
    """The fate of one that took part to the end, or for which no time was left."""
    if standing is None:
        each.drop("out_of_time", "There was no time left to measure it.")
        return
    speed = f"{standing.score.value:.2f} times as fast as eager"
    loss = f"; {each.proof.loss.describe()}" if each.proof and each.loses else ""
    if each.name == best_name:
        detail = f"at least {standing.score.least:.2f} times, over {standing.num_rounds} rounds"
        each.drop("chosen", f"It is {speed} ({detail}){loss}.")
    elif each.loses and not course.accepts_loss:
        each.drop("lossy", f"It is {speed}{loss}. It can win once the owner accepts loss.")
    elif standing.verdict == "faster":
        assert best is not None, "the best of those that are faster is no worse"
        each.drop("slower", f"It is {speed}; {best_name} is {best.score.value:.2f} times{loss}.")
    elif standing.verdict == "undecided":
        least = f"at least {standing.score.least:.2f} times but for {DOUBT:.1%} doubt"
        each.drop(
            "within_margin",
            f"It seems {speed}, but {least}, over {standing.num_rounds} rounds; {MARGIN} is asked "
            "for, and eager must not be faster at any batch size.",
        )
    else:
        worst = standing.by_size[standing.slowest_size].value
        is_uneven = standing.score.value >= MARGIN
        where = f", and {worst:.2f} times at a batch of {standing.slowest_size}"
        is_slower = is_uneven or standing.score.value < 1 / MARGIN
        fate = "slower" if is_slower else "within_margin"
        each.drop(fate, f"It is {speed}{where if is_uneven else ''}; {MARGIN} is asked for{loss}.")


def _eager_reason(eager: Candidate, others: Sequence[Candidate], outcome: Outcome) -> str:
    if eager.fate is not None:
        return f"The program as uploaded. It was not measured to the end: {eager.reason}"
    if outcome.best != eager.name:
        return f"The program as uploaded; {outcome.best} is faster."
    if not others:
        return "The program as uploaded; no other form suits it."
    return "The program as uploaded: no other form was proved and faster by the margin."
