"""What the untouched model says: the references that a served decoder is compared with.

Owns the prompts, the float64 logits and the noise that tolerances come from. Knows nothing of
paging.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.importing.huggingface import load_original

logger = logging.getLogger(__name__)

TOLERANCE_FACTOR = 4  # times the original's own deviation from float64
TOLERANCE_FLOOR = 1e-5  # of the logit range


@dataclass(frozen=True)
class PromptPlan:
    """How much is replayed: `lengths` of the prompts and tokens generated after each."""

    lengths: tuple[int, ...]
    num_new: int

    @property
    def num_forwards(self) -> int:
        """Roughly how many forward passes of about 32 tokens the whole proof takes."""
        return len(self.lengths) * (2 * self.num_new + 6) + sum(self.lengths) // 4


@dataclass(frozen=True)
class Trace:
    """One prompt, the original's greedy continuation, and exact logits at every position."""

    tokens: list[int]
    num_prompt: int
    reference: Tensor  # float64 [tokens, vocab]

    def gaps(self) -> Tensor:
        """How far the best token leads at each position."""
        best = self.reference.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]


@dataclass(frozen=True)
class Original:
    """`tolerance_of` a dtype is the largest logit error that its own rounding explains."""

    traces: list[Trace]
    tolerance_of: dict[torch.dtype, float]
    logit_range: float
    is_exact: bool  # the references were computed in float64


def choose_plan(
    original: PreTrainedModel,
    *,
    block_size: int,
    window: int | None,
    max_context_tokens: int,
    budget_seconds: float,
) -> PromptPlan:
    """The largest plan whose forwards fit the budget, judged by timing one.

    The longest prompt spans several blocks and reaches beyond the sliding window if it can.
    """
    long = 2 * block_size + 5
    beyond_window = long if window is None else max(long, window + block_size // 2)
    plans = [
        PromptPlan((beyond_window, block_size, block_size // 2 + 1, 3), 16),
        PromptPlan((long, block_size, block_size // 2 + 1, 3), 16),
        PromptPlan((block_size + 5, 3), 6),
        PromptPlan((block_size + 1, 3), 2),
    ]
    seconds = _seconds_per_forward(original, min(32, max_context_tokens))
    for plan in plans:
        room = max_context_tokens - plan.num_new
        if max(plan.lengths) <= room and plan.num_forwards * seconds <= budget_seconds:
            return plan
    num_new = min(2, max_context_tokens - 1)
    room = max_context_tokens - num_new
    return PromptPlan((min(block_size + 1, room), min(3, room)), num_new)


def consult_original(
    directory: Path,
    original: PreTrainedModel,
    plan: PromptPlan,
    dtypes: Sequence[torch.dtype],
    *,
    has_float64: bool = True,
) -> Original:
    """Replay the plan on the float32 original, which becomes float64 in place and is used up.

    Without float64, float32 itself is the reference, and its tolerance is the floor alone.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = original.get_input_embeddings().get_parameter("weight").shape[0]
    prompts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in plan.lengths]
    sequences = [prompt + _greedy(original, prompt, plan.num_new) for prompt in prompts]
    own: dict[torch.dtype, list[Tensor]] = {
        torch.float32: [_logits(original, tokens) for tokens in sequences]
    }
    references = _in_float64(original, sequences) if has_float64 else None
    is_exact = references is not None
    if references is None:
        references = [logits.double() for logits in own[torch.float32]]
    for dtype in dtypes:
        if dtype not in own:
            module = load_original(directory, dtype)
            own[dtype] = [_logits(module, tokens) for tokens in sequences]
    highest = max(float(reference.max()) for reference in references)
    logit_range = highest - min(float(reference.min()) for reference in references)
    tolerances = {
        dtype: max(
            TOLERANCE_FACTOR * largest_error(found, references), TOLERANCE_FLOOR * logit_range
        )
        for dtype, found in own.items()
    }
    traces = [
        Trace(tokens, len(prompt), reference)
        for tokens, prompt, reference in zip(sequences, prompts, references, strict=True)
    ]
    return Original(traces, tolerances, logit_range, is_exact)


def _in_float64(module: PreTrainedModel, sequences: Sequence[list[int]]) -> list[Tensor] | None:
    """Exact logits, or None if some operation of the model has no float64 form."""
    module.double()
    try:
        return [_logits(module, tokens) for tokens in sequences]
    except (RuntimeError, TypeError) as error:
        logger.info("No float64 reference: %s", error)
        return None


def largest_error(found: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest absolute difference; infinite where anything is not a number."""
    errors = [
        (logits.double() - reference).abs().nan_to_num(nan=torch.inf).max()
        for logits, reference in zip(found, references, strict=True)
    ]
    return float(max(errors))


@torch.inference_mode()
def _logits(module: PreTrainedModel, tokens: list[int]) -> Tensor:
    return module(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


@torch.inference_mode()
def _greedy(module: PreTrainedModel, prompt: list[int], num_new: int) -> list[int]:
    """The original's own cached generation, its most likely token each time."""
    generated: list[int] = []
    past, tokens = None, prompt
    while len(generated) < num_new:
        output = module(input_ids=torch.tensor([tokens]), past_key_values=past, use_cache=True)
        past = output.past_key_values
        tokens = [int(output.logits[0, -1].argmax())]
        generated += tokens
    return generated


def _seconds_per_forward(module: PreTrainedModel, num_tokens: int) -> float:
    _logits(module, [0] * num_tokens)  # the first reads the weights from disk
    started = time.perf_counter()
    _logits(module, [0] * num_tokens)
    return time.perf_counter() - started
