"""Chooses each sequence's next token from its logits.

Owns every rule of `SamplingParams` that concerns the choice of a token. Does not own when a
sequence stops. Rules apply in the order transformers applies them: grammar, bias, penalties,
temperature, top_k, top_p, min_p.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from struct import pack
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.execution.grammar_mask import mask_disallowed
from runtime.protocol import SamplingParams
from runtime.scheduling.sequence import Sequence
from runtime.text.grammars import GrammarState

GREEDY_TEMPERATURE = 1e-5  # at and below it, division by the temperature means nothing
# How many of the likeliest tokens are tried before a whole row is sorted for top_p.
NUM_CANDIDATES = 1024
BLOCK_TOKENS = 16  # tokens whose probabilities are summed, or compared, together first


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`logprob` and `top` (token id, logprob; best first) are of the model's own distribution,
    before any rule but the grammar; None and empty unless the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SamplingFailure:
    """The logits of this sequence are not numbers to choose by."""

    message: str


@dataclass(slots=True)
class TokenCounts:
    """What a penalised sequence has said so far, kept from step to step."""

    generated: Tensor  # float32 [vocab]
    is_seen: Tensor  # bool [vocab], in prompt or answer
    num_counted: int = 0

    def update(self, sequence: Sequence) -> None:
        fresh = sequence.token_ids[self.num_counted :]
        num_prompt = max(sequence.num_prompt_tokens - self.num_counted, 0)
        ids = torch.tensor(fresh, dtype=torch.int64, device=self.generated.device)
        self.is_seen[ids] = True
        ones = torch.ones_like(ids[num_prompt:], dtype=torch.float32)
        self.generated.index_add_(0, ids[num_prompt:], ones)
        self.num_counted = len(sequence.token_ids)


class Sampler:
    """Stateless but for the token counts of sequences with penalties and the grammars of those
    that have one, which die with them."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()
        self._grammars: WeakKeyDictionary[Sequence, GrammarState] = WeakKeyDictionary()

    def constrain(self, sequence: Sequence, grammar: GrammarState) -> None:
        """From here on the sequence's tokens are those that its grammar allows."""
        self._grammars[sequence] = grammar

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, sequences: list[Sequence]
    ) -> list[SampledToken | SamplingFailure]:
        """One token for each row of `logits` (float32 [sequences, vocab]; the rows of constrained
        sequences are masked in place)."""
        constrained = {
            row: grammar
            for row, sequence in enumerate(sequences)
            if (grammar := self._grammars.get(sequence)) is not None
        }
        failed = mask_disallowed(logits, sequences, constrained) if constrained else set[int]()
        params = [sequence.sampling for sequence in sequences]
        scores = self._apply_bias_and_penalties(logits, sequences)
        best, greedy_ids = scores.max(dim=-1)
        # NaN and +inf anywhere in a row show in its maximum; so does a row of only -inf.
        is_usable = best.isfinite().tolist()
        token_ids: list[int] = greedy_ids.tolist()
        for draw in (_draw_from_all, _draw_from_likeliest):
            rows = [
                row
                for row, each in enumerate(params)
                if is_usable[row] and _drawing_rule(each) is draw
            ]
            if rows:
                drawn = draw(scores[rows], [sequences[row] for row in rows])
                for row, token_id in zip(rows, drawn, strict=True):
                    token_ids[row] = token_id
        sampled: list[SampledToken | SamplingFailure] = [
            SampledToken(token_id)
            if usable
            else SamplingFailure("the model's logits are not finite (NaN or infinity)")
            for token_id, usable in zip(token_ids, is_usable, strict=True)
        ]
        for row in failed:
            is_usable[row] = False
            sampled[row] = SamplingFailure("the grammar of the answer became too complex")
        for row, each in enumerate(params):
            if each.logprobs is not None and is_usable[row]:
                sampled[row] = _with_logprobs(logits[row], token_ids[row], each.logprobs)
        return sampled

    def _apply_bias_and_penalties(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        """The same tensor when no sequence has any, else a changed copy."""
        rows = [row for row, sequence in enumerate(sequences) if _is_shaped(sequence.sampling)]
        if not rows:
            return logits
        scores = logits.clone()
        for row in rows:
            sequence = sequences[row]
            if bias := sequence.sampling.logit_bias:
                ids = torch.tensor(list(bias), device=logits.device)
                scores[row, ids] += torch.tensor(list(bias.values()), device=logits.device)
            if _is_penalised(sequence.sampling):
                self._penalise(scores[row], sequence)
        return scores

    def _penalise(self, scores: Tensor, sequence: Sequence) -> None:
        params, counts = sequence.sampling, self._counts.get(sequence)
        if counts is None:
            counts = TokenCounts(torch.zeros_like(scores), torch.zeros_like(scores).bool())
            self._counts[sequence] = counts
        counts.update(sequence)
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores.copy_(torch.where(counts.is_seen, penalised, scores))
        scores -= params.frequency_penalty * counts.generated
        scores -= params.presence_penalty * (counts.generated > 0)


def _is_penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def _is_shaped(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or _is_penalised(params)


DrawingRule = Callable[[Tensor, list[Sequence]], list[int]]


def _drawing_rule(params: SamplingParams) -> DrawingRule | None:
    """None is greedy. Only top_k and top_p need the tokens in order, which is what costs."""
    if params.temperature <= GREEDY_TEMPERATURE:
        return None
    return _draw_from_likeliest if params.top_k > 0 or params.top_p < 1.0 else _draw_from_all


def _draw_from_all(scores: Tensor, sequences: list[Sequence]) -> list[int]:
    return _pick(_heat(scores, sequences), sequences).flatten().tolist()


def _draw_from_likeliest(scores: Tensor, sequences: list[Sequence]) -> list[int]:
    """With top_k and top_p. Exact: rows are sorted whole when the candidates do not suffice.

    Rows go together by how many candidates each needs by itself: in what order equal scores come
    depends on that number, so it must not depend on a row's neighbours.
    """
    scores = _heat(scores, sequences)
    vocab_size = scores.shape[-1]
    rows_of: dict[int, list[int]] = {}
    for row, each in enumerate(sequences):
        num_candidates = min(vocab_size, max(NUM_CANDIDATES, each.sampling.top_k))
        rows_of.setdefault(num_candidates, []).append(row)
    token_ids = [0] * len(sequences)
    while rows_of:
        num_candidates, rows = rows_of.popitem()
        drawn = _draw_from_top(scores[rows], [sequences[row] for row in rows], num_candidates)
        for row, token_id in zip(rows, drawn, strict=True):
            if token_id is None:
                rows_of.setdefault(vocab_size, []).append(row)
            else:
                token_ids[row] = token_id
    return token_ids


def _draw_from_top(
    scores: Tensor, sequences: list[Sequence], num_candidates: int
) -> list[int | None]:
    """From each row's likeliest tokens; None where they hold less than top_p."""
    params = [each.sampling for each in sequences]
    vocab_size = scores.shape[-1]
    top_k = _column(scores, [each.top_k if each.top_k > 0 else vocab_size for each in params])
    top_p = _column(scores, [max(each.top_p, 1e-9) for each in params])
    kept, ids = _likeliest(scores, num_candidates)
    kept = kept.masked_fill(torch.arange(num_candidates, device=kept.device) >= top_k, -inf)
    # top_p is a share of what top_k left, which without top_k is the whole row.
    total = torch.where(top_k < vocab_size, kept.logsumexp(-1, True), scores.logsumexp(-1, True))
    shares = (kept - total).exp()
    mass = shares.cumsum(-1, dtype=torch.float64)
    is_enough = (mass[:, -1:] >= top_p) | (top_k < vocab_size) | (num_candidates == vocab_size)
    # A token stays while those before it have not yet reached top_p; so the first always does.
    kept = kept.masked_fill(mass - shares >= top_p, -inf)
    drawn = ids.gather(-1, _pick(kept, sequences)).flatten().tolist()
    pairs = zip(drawn, is_enough.flatten().tolist(), strict=True)
    return [token_id if enough else None for token_id, enough in pairs]


def _likeliest(scores: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """(scores, ids) `[rows, candidates]`, best first.

    On CPUs `topk` over a whole vocabulary costs more than a small model. The k-th largest of the
    maxima of blocks is at most the k-th largest score, so only what reaches it is sorted.
    """
    num_whole = scores.shape[-1] // BLOCK_TOKENS * BLOCK_TOKENS
    if scores.device.type != "cpu" or 2 * num_candidates * BLOCK_TOKENS > num_whole:
        return scores.topk(num_candidates)
    found = [_likeliest_of_row(row, num_candidates, num_whole) for row in scores]
    return torch.stack([kept for kept, _ in found]), torch.stack([ids for _, ids in found])


def _likeliest_of_row(row: Tensor, num_candidates: int, num_whole: int) -> tuple[Tensor, Tensor]:
    """One row alone, so that the order of equal scores does not depend on its neighbours."""
    maxima = row[:num_whole].view(-1, BLOCK_TOKENS).amax(-1)
    threshold = maxima.topk(num_candidates, sorted=False).values.amin()
    ids = (row >= threshold).nonzero().flatten()
    kept, order = row[ids].sort(descending=True, stable=True)
    return kept[:num_candidates], ids[order[:num_candidates]]


def _heat(scores: Tensor, sequences: list[Sequence]) -> Tensor:
    """Apply the temperatures; the best score of each row becomes 0, so that none overflows."""
    temperatures = _column(scores, [each.sampling.temperature for each in sequences])
    return (scores - scores.amax(-1, keepdim=True)) / temperatures


def _pick(scores: Tensor, sequences: list[Sequence]) -> Tensor:
    """Apply min_p to scores whose best is 0, then draw a column of each row in proportion to its
    probability: [rows, 1]."""
    if any(each.sampling.min_p for each in sequences):
        min_p = _column(scores, [each.sampling.min_p for each in sequences])
        scores = scores.masked_fill(scores < min_p.log(), -inf)
    # First the block of tokens is drawn, then the token inside it: sums of float64 are what costs.
    weights = F.pad(scores.exp(), (0, -scores.shape[-1] % BLOCK_TOKENS))
    blocks = weights.view(len(scores), -1, BLOCK_TOKENS)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    targets = _column(sums, [uniform(each) for each in sequences]) * sums[:, -1:]
    # right=True skips what has probability 0, whose cumulative value equals its neighbour's.
    block = torch.searchsorted(sums, targets, right=True)
    targets = targets - F.pad(sums, (1, 0)).gather(-1, block)
    inside = blocks[torch.arange(len(scores), device=scores.device), block.flatten()]
    inside = inside.cumsum(-1, dtype=torch.float64)
    # The two sums of a block may differ in their last bit: the target stays below this one's.
    targets = torch.minimum(targets, inside[:, -1:] * (1 - 2**-50))
    return block * BLOCK_TOKENS + torch.searchsorted(inside, targets, right=True)


def _column(like: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)


def uniform(sequence: Sequence) -> float:
    """The random number, inside (0, 1), that chooses the sequence's next token.

    A function of seed, choice and position alone, so that a seeded answer does not depend on
    what else is in the batch, nor on preemption.
    """
    key = pack("<qqq", sequence.seed, sequence.choice, len(sequence.token_ids))
    return (int.from_bytes(blake2b(key, digest_size=4).digest(), "little") + 0.5) / 2**32


def _with_logprobs(logits: Tensor, token_id: int, num_top: int) -> SampledToken:
    """`logits`: [vocab], as the model gave them."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, len(logits)))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return SampledToken(token_id, float(logprobs[token_id]), top)
