"""Proves one candidate: that it answers as the program as uploaded does, for every kind of batch
that serving makes, or measures how much it loses. The cases are `candidate_cases.py`'s.
"""

import math
from collections.abc import Callable, Sequence

import msgspec
import torch

from runtime.protocol import Check
from runtime.proving.candidate_case import Case
from runtime.proving.candidate_cases import Cases, Neighbours
from runtime.proving.comparing import (
    Outputs,
    compare,
    finite,
    is_logits,
    same_bits,
    take_rows,
)

# Of a form that may lose accuracy: what it must keep in any case.
LEAST_AGREEMENT = 0.99  # share of rows with the same largest value
MOST_LOSS = 0.05  # root mean square of the error, of each output's own spread
NEAR_TIE = 0.01  # of an output's range: below it the two largest values are not told apart

UNUSUAL = {
    "scaled": "values that are far larger, and far smaller, than usual",
    "ties": "equal values, constant rows and zeros",
    "integers": "integers from all over their dtype",
}

Run = Callable[[list[torch.Tensor]], Outputs]
Answers = Sequence[tuple[Case, Outputs]]


class Loss(msgspec.Struct, frozen=True):
    """What a form loses. `error` is a share of an output's spread; `agreement` of the largest
    values, near ties aside, or of the values of integer outputs; None: there are none."""

    error: float
    agreement: float | None

    @property
    def is_bounded(self) -> bool:
        """Whether it is one that an owner may accept."""
        agreement = 1.0 if self.agreement is None else self.agreement
        return self.error <= MOST_LOSS and agreement >= LEAST_AGREEMENT

    def describe(self) -> str:
        """In plain words."""
        agreement = "" if self.agreement is None else f", top-1 agreement {self.agreement:.2%}"
        return f"error {self.error:.3%} of the outputs' spread{agreement}"


class CandidateProof(msgspec.Struct, frozen=True, kw_only=True):
    """`is_equal`: within the program's own rounding, everywhere. `is_sound`: whatever it loses,
    rows do not touch each other and shapes, dtypes and NaN are right, for inputs that are not NaN
    themselves: those are not compared. `error` is the largest, in
    multiples of what is allowed. `wide_loss` is that of values larger than usual, where the range
    of an input is not known."""

    checks: list[Check]
    error: float | None
    is_equal: bool
    is_sound: bool
    loss: Loss
    wide_loss: Loss | None

    @property
    def first_failure(self) -> str:
        """The first check that failed, for a reason."""
        failed = next((check for check in self.checks if not check.is_equal), None)
        return f"{failed.name}: {failed.detail}" if failed else ""


def prove_candidate(
    name: str, run: Run, cases: Cases, report: Callable[[float, str], None] = lambda *_: None
) -> CandidateProof:
    """`run` is the candidate; whatever it raises ends the proof. `name` marks the checks."""
    answers: list[tuple[Case, Outputs]] = []
    for index, case in enumerate(cases.generated):
        answers.append((case, run(case.inputs)))
        line = f"proving {name} against eager, batch {index + 1} of {len(cases.generated)}"
        report((index + 1) / (len(cases.generated) + 2), line)
    of_examples = [(case, run(case.inputs)) for case in cases.examples]
    wide = [(case, found) for case, found in answers if case.name == "wide"]
    loss = find_loss([*(each for each in answers if each[0].name != "wide"), *of_examples])
    checks = [_answers_check("answers", answers, "generated batches")]
    if of_examples:
        checks.append(_answers_check("examples", of_examples, "examples of the owner"))
    if (top_1 := _top_1_check([*answers, *of_examples])) is not None:
        checks.append(top_1)
    unusual = _unusual_checks(run, cases.unusual)
    may_lose = loss.is_bounded and not all(check.is_equal for check in checks)
    rows, mine = next((case, found) for case, found in answers if case is cases.rows)
    sound = [_repeat_check(run, rows, mine, may_lose)]
    if cases.is_batched:
        sound.append(_alone_check(run, rows, mine, may_lose))
        sound.append(_neighbours_check(run, rows, cases.neighbours, mine, may_lose))
    checks += unusual
    errors = [check.error for check in checks if check.tolerance == 1.0]
    return CandidateProof(
        checks=[msgspec.structs.replace(check, form=name) for check in [*checks, *sound]],
        error=None if None in errors else max(error for error in errors if error is not None),
        is_equal=all(check.is_equal for check in [*checks, *sound]),
        is_sound=all(check.is_equal for check in sound)
        and not any(check.error is None and check.name != "unusual, ties" for check in unusual)
        and math.isfinite(loss.error),
        loss=loss,
        wide_loss=find_loss(wide) if wide else None,
    )


# --- against the program as uploaded ----------------------------------------------------


def _answers_check(name: str, answers: Answers, what: str) -> Check:
    """NaN and infinity must be where the original has them; shapes and dtypes are compared too."""
    pairs = [compare(case.expected, found, case.tolerance) for case, found in answers]
    return Check(
        name=name,
        is_equal=all(is_equal for _, is_equal in pairs),
        detail=f"{len(pairs)} {what} against eager; error in multiples of what is allowed",
        error=finite(max(error for error, _ in pairs)),
        tolerance=1.0,
    )


def _unusual_checks(run: Run, cases: Sequence[Case]) -> list[Check]:
    """One for each kind. An error that is infinite is a number where there is none, none where
    there is one, or another integer."""
    worst: dict[str, float] = {}
    for case in cases:
        assert case.compared is not None, "it is known where they are compared"
        found = run(case.inputs)
        if any(a.shape != b.shape for a, b in zip(found, case.expected, strict=True)):
            error = math.inf
        else:
            masks = case.compared
            mine = [each.where(mask, 0) for each, mask in zip(found, masks, strict=True)]
            own = [each.where(mask, 0) for each, mask in zip(case.expected, masks, strict=True)]
            error, _ = compare(own, mine, case.tolerance)
        worst[case.name] = max(worst.get(case.name, 0.0), error)
    return [
        Check(
            name=f"unusual, {name}",
            is_equal=error <= 1.0,
            detail=f"{UNUSUAL[name]}, against eager where that is finite; error in multiples of "
            "what is allowed",
            error=finite(error),
            tolerance=1.0,
        )
        for name, error in worst.items()
    ]


def _top_1_check(answers: Answers) -> Check | None:
    num_clear = num_same = 0
    for case, found in answers:
        for index, expected in enumerate(case.expected):
            if is_logits(expected) and found[index].shape == expected.shape:
                is_clear, is_same = _top_1(expected, found[index], case.tolerance.allowed[index])
                num_clear += int(is_clear.sum())
                num_same += int((is_clear & is_same).sum())
    if not num_clear:
        return None
    return Check(
        name="top-1",
        is_equal=num_same == num_clear,
        detail=f"{num_same:,} of {num_clear:,} clear largest values agree",
        num_judged=num_clear,
        num_same=num_same,
    )


def _top_1(
    expected: torch.Tensor, found: torch.Tensor, allowed: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the largest value is clear of the next by twice what is allowed, and where it is the
    same."""
    top = expected.double().topk(2, dim=-1).values
    return top[..., 0] - top[..., 1] > 2 * allowed, expected.argmax(-1) == found.argmax(-1)


def find_loss(answers: Answers) -> Loss:
    """Over all answers, the worst output's error and the share of largest values kept. An answer
    of another shape, or with NaN where the original has none, is an infinite loss."""
    worst = 0.0
    num_judged = num_same = 0
    for index in range(len(answers[0][0].expected)):
        pairs = [(case.expected[index], found[index]) for case, found in answers]
        if any(left.shape != right.shape or left.dtype != right.dtype for left, right in pairs):
            return Loss(math.inf, 0.0)
        if not pairs[0][0].is_floating_point():
            num_judged += sum(left.numel() for left, _ in pairs)
            num_same += sum(int((left == right).sum()) for left, right in pairs)
            continue
        worst = max(worst, _relative_error(pairs))
        near = NEAR_TIE * _range([left for left, _ in pairs])
        for left, right in pairs:
            if is_logits(left):
                is_clear, is_same = _top_1(left, right, near / 2)
                num_judged += int(is_clear.sum())
                num_same += int((is_clear & is_same).sum())
    return Loss(worst, num_same / num_judged if num_judged else None)


def _relative_error(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Root mean square of the error over that of the original's distance from its mean."""
    left = torch.cat([each.double().flatten() for each, _ in pairs])
    right = torch.cat([each.double().flatten() for _, each in pairs])
    known = left.isfinite()
    if not known.any():
        return 0.0
    left, right = left[known], right[known]
    if not right.isfinite().all():
        return math.inf
    spread = float((left - left.mean()).square().mean().sqrt()) or float(left.abs().max()) or 1.0
    return float((left - right).square().mean().sqrt()) / spread


def _range(tensors: Sequence[torch.Tensor]) -> float:
    known = torch.cat([each[each.isfinite()].double() for each in tensors])
    return float(known.max() - known.min()) if known.numel() else 0.0


# --- against itself ---------------------------------------------------------------------


def _repeat_check(run: Run, case: Case, found: Outputs, may_lose: bool) -> Check:
    again = run(case.inputs)
    if all(same_bits(left, right) for left, right in zip(found, again, strict=True)):
        return Check(name="repeat", is_equal=True, detail="two runs on one input agree bit for bit")
    return _own_check("repeat", "two runs on one input", case, found, again, may_lose)


def _alone_check(run: Run, case: Case, found: Outputs, may_lose: bool) -> Check:
    picked = sorted({0, 1, case.num_rows - 1})
    alone = [run(take_rows(case.inputs, [row])) for row in picked]
    together = [torch.cat([each[index] for each in alone]) for index in range(len(found))]
    mine = take_rows(found, picked)
    detail = f"{len(picked)} rows against themselves alone"
    return _own_check("batch and single", detail, case, mine, together, may_lose)


def _neighbours_check(
    run: Run, case: Case, neighbours: Neighbours, found: Outputs, may_lose: bool
) -> Check:
    """The middle row beside rows that all are such a neighbour; the worst of them is told."""
    middle = case.num_rows // 2
    mine = take_rows(found, [middle])
    checks = []
    for name, row in neighbours:
        others = [
            torch.cat(
                [
                    tensor.expand_as(own[:middle]),
                    own[middle : middle + 1],
                    tensor.expand_as(own[middle + 1 :]),
                ]
            )
            for own, tensor in zip(case.inputs, row, strict=True)
        ]
        beside = take_rows(run(others), [middle])
        detail = f"a row beside rows of {name}, against itself beside others"
        checks.append(_own_check("neighbours", detail, case, mine, beside, may_lose))
    worst = max(checks, key=lambda check: math.inf if check.error is None else check.error)
    if worst.is_equal:
        names = ", ".join(name for name, _ in neighbours)
        detail = f"a row beside rows of each of {names}; error in multiples of what is allowed"
        return msgspec.structs.replace(worst, detail=detail)
    return worst


def _own_check(
    name: str, detail: str, case: Case, expected: Outputs, found: Outputs, may_lose: bool
) -> Check:
    """Answers of one form to one question, asked in two ways. What it may be off from itself is
    what the original may be off; of a form that loses accuracy, what it may lose."""
    error, is_equal = compare(expected, found, case.tolerance)
    if not is_equal and may_lose:
        lost = find_loss([(msgspec.structs.replace(case, expected=expected), found)])
        spread_error = lost.error / MOST_LOSS
        error, is_equal = spread_error, spread_error <= 1.0
    return Check(
        name=name,
        is_equal=is_equal,
        detail=f"{detail}; error in multiples of what is allowed",
        error=finite(error),
        tolerance=1.0,
    )
