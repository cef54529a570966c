"""What the untouched model says: the references that a served decoder is compared with.

Owns the prompts, the float64 logits and the noise that tolerances come from. Knows nothing of
paging, nor of what the original is: see `huggingface_original.py` and `exported_original.py`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TOLERANCE_FACTOR = 4  # times the original's own deviation from float64
TOLERANCE_FLOOR = 1e-5  # of the logit range
FORWARD_TOKENS = 32  # of the forward pass whose time a plan is judged by


class LoadedOriginal(Protocol):
    """The untouched model in one dtype."""

    def logits(self, tokens: list[int]) -> Tensor:
        """`[tokens, vocab]`, of one sequence computed as a whole."""
        ...

    def continue_greedily(self, tokens: list[int], num_new: int) -> list[int]:
        """Its own most likely token each time, `num_new` times."""
        ...


class OriginalModel(Protocol):
    """What was uploaded, to be run just as its owner would run it."""

    @property
    def num_parameters(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """Token ids below it are ones that the model can look up."""
        ...

    @property
    def min_tokens(self) -> int:
        """The shortest sequence that it takes."""
        ...

    @property
    def recomputes(self) -> bool:
        """Each token that it generates costs a whole sequence."""
        ...

    def load(self, dtype: torch.dtype) -> LoadedOriginal:
        """A fresh copy of the model, computing in `dtype`."""
        ...


@dataclass(frozen=True)
class PromptPlan:
    """How much is replayed: `lengths` of the prompts and tokens generated after each."""

    lengths: tuple[int, ...]
    num_new: int

    def num_forwards(self, *, recomputes: bool) -> int:
        """Roughly how many forward passes of about 32 tokens the whole proof takes."""
        num_served = len(self.lengths) * (2 * self.num_new + 8) + sum(self.lengths) // 4
        if not recomputes:
            return num_served
        return num_served + self.num_new * sum(self.lengths) // FORWARD_TOKENS


@dataclass(frozen=True)
class Trace:
    """One prompt, the original's greedy continuation, and exact logits at every position.

    Row i is what the original says after token i of the sequence, seen as a whole; of a decoder
    that is not causal, what it says after `tokens[:i + 1]` alone, for i in `ends` less one.
    """

    tokens: list[int]
    num_prompt: int
    reference: Tensor  # float64 [tokens, vocab]
    ends: tuple[int, ...] = ()
    first_row: int = 0  # its rows' numbers start here: they are counted through all traces


@dataclass(frozen=True)
class References:
    """`deviations_of` a dtype are what the original itself is off by in it, `tolerance` the largest
    error in float32 that this explains, and `floor` the least that any is."""

    plan: PromptPlan
    traces: list[Trace]
    deviations_of: dict[torch.dtype, Tensor]  # float64 [rows]
    tolerance: float
    floor: float
    logit_range: float
    is_exact: bool  # the references were computed in float64


def choose_plan(
    original: OriginalModel,
    loaded: LoadedOriginal,
    *,
    block_size: int,
    window: int | None,
    max_context_tokens: int,
    budget_seconds: float,
    is_whole: bool = False,
) -> PromptPlan:
    """The largest plan whose forwards fit the budget, judged by timing one.

    The longest prompt spans several blocks and reaches beyond the sliding window if it can.
    """
    long = 2 * block_size + 5
    beyond_window = long if window is None else max(long, window + block_size // 2)
    short = max(3, original.min_tokens)
    plans = [
        PromptPlan((beyond_window, block_size, block_size // 2 + 1, short), 16),
        PromptPlan((long, block_size, block_size // 2 + 1, short), 16),
        PromptPlan((block_size + 5, short), 6),
        PromptPlan((block_size + 1, short), 2),
    ]
    seconds = _seconds_per_forward(loaded, min(FORWARD_TOKENS, max_context_tokens))
    for plan in plans:
        room = max_context_tokens - plan.num_new
        num_forwards = plan.num_forwards(recomputes=original.recomputes or is_whole)
        if max(plan.lengths) <= room and num_forwards * seconds <= budget_seconds:
            return plan
    num_new = min(2, max_context_tokens - 1)
    room = max_context_tokens - num_new
    return PromptPlan((min(block_size + 1, room), min(short, room)), num_new)


def consult_original(
    original: OriginalModel,
    choose: Callable[[LoadedOriginal], PromptPlan],
    dtypes: Sequence[torch.dtype],
    *,
    has_float64: bool = True,
    is_whole: bool = False,
) -> References:
    """Replay a plan, chosen by the original in float32, on it in float32, float64 and `dtypes`.

    Without float64, float32 itself is the reference, and its tolerance is the floor alone.
    `is_whole` asks about each beginning of a sequence by itself, for models that look ahead.
    """
    loaded = original.load(torch.float32)
    plan = choose(loaded)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(original.vocab_size, (n,), generator=generator).tolist() for n in plan.lengths
    ]
    sequences = [prompt + loaded.continue_greedily(prompt, plan.num_new) for prompt in prompts]
    ends = [()] * len(sequences)
    if is_whole:
        ends = [
            _ends(tokens, len(prompt), sequences)
            for tokens, prompt in zip(sequences, prompts, strict=True)
        ]
    asked = list(zip(sequences, ends, strict=True))
    own: dict[torch.dtype, list[Tensor]] = {torch.float32: ask(loaded, asked)}
    del loaded  # before the next one takes its place
    references = _in_float64(original, asked) if has_float64 else None
    is_exact = references is not None
    if references is None:
        references = [logits.double() for logits in own[torch.float32]]
    for dtype in dtypes:
        if dtype not in own:
            own[dtype] = ask(original.load(dtype), asked)
    highest = max(float(reference.max()) for reference in references)
    logit_range = highest - min(float(reference.min()) for reference in references)
    deviations = {dtype: row_errors(found, references) for dtype, found in own.items()}
    floor = TOLERANCE_FLOOR * logit_range
    tolerance = max(TOLERANCE_FACTOR * float(deviations[torch.float32].max()), floor)
    traces: list[Trace] = []
    first_row = 0
    for i, tokens in enumerate(sequences):
        traces.append(Trace(tokens, plan.lengths[i], references[i], ends[i], first_row))
        first_row += len(tokens)
    return References(plan, traces, deviations, tolerance, floor, logit_range, is_exact)


def _ends(tokens: list[int], num_prompt: int, all_sequences: list[list[int]]) -> tuple[int, ...]:
    """Where a sequence is cut to be run by itself: at each of its generated tokens, and at the
    lengths of the others, which it will run beside."""
    own = range(num_prompt, len(tokens) + 1)
    others = [len(other) for other in all_sequences if len(other) <= len(tokens)]
    return tuple(sorted({*own, *others}))


def ask(loaded: LoadedOriginal, asked: Sequence[tuple[list[int], tuple[int, ...]]]) -> list[Tensor]:
    """Logits `[tokens, vocab]` of each sequence; the rows before its `ends`, if it has any, are
    those of its beginnings alone, and the others 0."""
    found = []
    for tokens, ends in asked:
        if not ends:
            found.append(loaded.logits(tokens))
            continue
        rows = [loaded.logits(tokens[:end])[-1] for end in ends]
        logits = rows[0].new_zeros(len(tokens), len(rows[0]))
        logits[[end - 1 for end in ends]] = torch.stack(rows)
        found.append(logits)
    return found


def _in_float64(
    original: OriginalModel, asked: Sequence[tuple[list[int], tuple[int, ...]]]
) -> list[Tensor] | None:
    """Exact logits, or None if some operation of the model has no float64 form."""
    try:
        references = ask(original.load(torch.float64), asked)
    except (RuntimeError, TypeError) as error:
        logger.info("no float64 reference: %s", error)
        return None
    return references if all(each.dtype == torch.float64 for each in references) else None


def row_errors(found: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """The largest absolute difference in each row, float64 `[rows]`; infinite where something is
    not a number. Both are lists of `[rows, vocab]`."""
    return torch.cat(
        [
            (logits.double() - reference).abs().nan_to_num(nan=torch.inf).amax(-1)
            for logits, reference in zip(found, references, strict=True)
        ]
    )


def _seconds_per_forward(loaded: LoadedOriginal, num_tokens: int) -> float:
    loaded.logits([0] * num_tokens)  # the first reads the weights from disk
    started = time.perf_counter()
    loaded.logits([0] * num_tokens)
    return time.perf_counter() - started
