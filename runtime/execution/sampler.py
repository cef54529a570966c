"""Chooses each sequence's next token from its logits.

Owns every rule of `SamplingParams` that concerns the choice of a token. Does not own when a
sequence stops. Rules apply in the order transformers applies them: grammar, bias, penalties,
temperature, top_k, top_p, min_p. The device is waited for once, for the tokens; again only when
`NUM_CANDIDATES` hold less than a top_p.
"""

from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from struct import pack
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.cache.transfer import fetch, is_at_hand, send
from runtime.execution.grammar_mask import GrammarMasks
from runtime.protocol import SamplingParams
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.validation import MAX_LOGPROBS
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
    """The logits of this sequence are not numbers to choose by, or, where `is_refusal`, its
    caller's own grammar cannot be followed further."""

    message: str
    is_refusal: bool = False


Sampled = SampledToken | SamplingFailure


@dataclass(slots=True)
class TokenCounts:
    """What a penalised sequence has said so far, kept from step to step."""

    generated: Tensor  # float32 [vocab]
    is_seen: Tensor  # bool [vocab], in prompt or answer
    num_counted: int = 0

    def update(self, sequence: Sequence) -> None:
        fresh = sequence.token_ids[self.num_counted :]
        num_prompt = max(sequence.num_prompt_tokens - self.num_counted, 0)
        ids = send(torch.tensor(fresh, dtype=torch.int64), self.generated.device)
        self.is_seen.index_fill_(0, ids, True)
        ones = torch.ones_like(ids[num_prompt:], dtype=torch.float32)
        self.generated.index_add_(0, ids[num_prompt:], ones)
        self.num_counted = len(sequence.token_ids)


class Sampler:
    """Stateless but for the token counts of sequences with penalties and the grammars of those
    that have one, which die with them."""

    def __init__(self, num_ids: int | None = None) -> None:
        """Token ids from `num_ids` on, if it is given, are padding of the vocabulary."""
        self._num_ids = num_ids
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()
        self._grammars: WeakKeyDictionary[Sequence, GrammarState] = WeakKeyDictionary()
        self._masks = GrammarMasks()

    def constrain(self, sequence: Sequence, grammar: GrammarState) -> None:
        """From here on the sequence's tokens are those that its grammar allows."""
        self._grammars[sequence] = grammar

    def begin(self, sequences: list[Sequence]) -> None:
        """What can be found out about their next tokens while their logits are computed."""
        self._masks.begin(
            {each: self._grammars[each] for each in sequences if each in self._grammars}
        )

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[Sampled]:
        """One token for each row of `logits` (float32 [sequences, vocab]; masked in place
        where the vocabulary is padded, or a grammar allows only some)."""
        if self._num_ids is not None and self._num_ids < logits.shape[-1]:
            logits[:, self._num_ids :] = -inf
        constrained = {
            row: (sequence, grammar)
            for row, sequence in enumerate(sequences)
            if (grammar := self._grammars.get(sequence)) is not None
        }
        failed = self._masks.apply(logits, constrained) if constrained else {}
        scores = self._apply_bias_and_penalties(logits, sequences)
        first = _choose(logits, scores, sequences)
        missing = [row for row, each in enumerate(first) if each is None]
        again: list[Sampled | None] = []
        if missing:
            rows = send(torch.tensor(missing), logits.device)
            those = [sequences[row] for row in missing]
            again = _choose(logits[rows], scores[rows], those, is_whole=True)
        found = dict(zip(missing, again, strict=True))
        sampled = [each or found[row] for row, each in enumerate(first)]
        for row, is_refusal in failed.items():
            sampled[row] = SamplingFailure("its grammar cannot be followed further", is_refusal)
        assert None not in sampled, "a whole row is enough"
        return [each for each in sampled if each is not None]

    def _apply_bias_and_penalties(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        """The same tensor when no sequence has any, else a changed copy."""
        rows = [row for row, sequence in enumerate(sequences) if _is_shaped(sequence.sampling)]
        if not rows:
            return logits
        scores = logits.clone()
        for row in rows:
            sequence = sequences[row]
            if bias := sequence.sampling.logit_bias:
                ids = send(torch.tensor(list(bias)), logits.device)
                values = torch.tensor(list(bias.values()), dtype=logits.dtype)
                scores[row].index_add_(0, ids, send(values, logits.device))
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


def _choose(
    logits: Tensor, scores: Tensor, sequences: list[Sequence], *, is_whole: bool = False
) -> list[Sampled | None]:
    """By row, None where more candidates are needed; with `is_whole`, which takes longer, none is.
    Decided on the device, which is waited for once."""
    best, token_ids = scores.max(dim=-1)
    # NaN and +inf anywhere in a row show in its maximum; so does a row of only -inf.
    is_usable = best.isfinite()
    is_enough = torch.ones_like(is_usable)
    for num_candidates, rows in _rows_by_candidates(sequences, scores.shape[-1], is_whole).items():
        at = send(torch.tensor(rows), scores.device)
        usable = _with_numbers(_select(scores, rows, at), is_usable[at])
        drawn, enough = _draw(usable, [sequences[row] for row in rows], num_candidates)
        token_ids = token_ids.index_copy(0, at, drawn)
        is_enough = is_enough.index_copy(0, at, enough)
    reported = [row for row, each in enumerate(sequences) if each.sampling.logprobs is not None]
    found = fetch(token_ids, is_usable, is_enough, *_logprobs(logits, token_ids, reported))
    chosen: list[Sampled | None] = []
    for token_id, usable, enough in zip(*(each.tolist() for each in found[:3]), strict=True):
        if not usable:
            failure = SamplingFailure("the model's logits are not finite (NaN or infinity)")
            chosen.append(failure)
        else:
            chosen.append(SampledToken(int(token_id)) if enough else None)
    for row, logprob, values, ids in zip(
        reported, *(each.tolist() for each in found[3:]), strict=True
    ):
        token, num_top = chosen[row], sequences[row].sampling.logprobs or 0
        if isinstance(token, SampledToken):
            top = list(zip(map(int, ids), values, strict=True))[:num_top]
            chosen[row] = SampledToken(token.token_id, logprob, top)
    return chosen


def _rows_by_candidates(
    sequences: list[Sequence], vocab_size: int, is_whole: bool
) -> dict[int, list[int]]:
    """Rows that draw by how many of the likeliest tokens they need in order; 0 is none, for only
    top_k and top_p need an order, which is what costs.

    A row's number is its own: in what order equal scores come depends on it, so it must not depend
    on the row's neighbours.
    """
    rows_of: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        if params.temperature <= GREEDY_TEMPERATURE:
            continue
        num_candidates = 0
        if params.top_k > 0 or params.top_p < 1.0:
            least = vocab_size if is_whole else NUM_CANDIDATES
            num_candidates = min(vocab_size, max(least, params.top_k))
        rows_of.setdefault(num_candidates, []).append(row)
    return rows_of


def _select(tensor: Tensor, rows: list[int], at: Tensor) -> Tensor:
    """The rows `at`, which are `rows` on the device; all of them as they are."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, at)


def _with_numbers(scores: Tensor, is_usable: Tensor) -> Tensor:
    """Equal scores where there is nothing to draw by, so that drawing is defined. Whether that is
    so anywhere is not asked of a device that would have to be waited for."""
    if is_at_hand(scores) and bool(is_usable.all()):
        return scores
    return scores.masked_fill(~is_usable.unsqueeze(-1), 0.0)


@dataclass(frozen=True, slots=True)
class _Rules:
    """What sequences draw by, `[rows, 1]` each, in the scores' dtype but for the last."""

    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor  # float64

    @classmethod
    def of(cls, sequences: list[Sequence], scores: Tensor) -> "_Rules":
        """In one transfer to the scores' device."""
        rows = [
            (
                each.sampling.temperature,
                each.sampling.min_p,
                each.sampling.top_k if each.sampling.top_k > 0 else scores.shape[-1],
                max(each.sampling.top_p, 1e-9),
                uniform(each),
            )
            for each in sequences
        ]
        numbers = send(torch.tensor(rows, dtype=torch.float64).t().contiguous(), scores.device)
        *rules, uniforms = numbers.unsqueeze(-1)
        return cls(*(rule.to(scores.dtype) for rule in rules), uniform=uniforms)


def _draw(scores: Tensor, sequences: list[Sequence], num_candidates: int) -> tuple[Tensor, Tensor]:
    """Token ids [rows], from the candidates or from all if there are to be 0; and whether the
    candidates hold as much as top_p [rows]."""
    rules = _Rules.of(sequences, scores)
    has_min_p = any(each.sampling.min_p for each in sequences)
    # The best score of each row becomes 0, so that no temperature makes one overflow.
    scores = (scores - scores.amax(-1, keepdim=True)) / rules.temperature
    if num_candidates == 0:
        drawn = _pick(scores, rules, has_min_p).squeeze(-1)
        return drawn, torch.ones_like(drawn, dtype=torch.bool)
    vocab_size = scores.shape[-1]
    kept, ids = _likeliest(scores, num_candidates)
    kept = kept.masked_fill(torch.arange(num_candidates, device=kept.device) >= rules.top_k, -inf)
    # top_p is a share of what top_k left, which without top_k is the whole row.
    has_top_k = rules.top_k < vocab_size
    total = torch.where(has_top_k, kept.logsumexp(-1, True), scores.logsumexp(-1, True))
    shares = (kept - total).exp()
    mass = shares.cumsum(-1, dtype=torch.float64)
    is_enough = (mass[:, -1:] >= rules.top_p) | has_top_k | (num_candidates == vocab_size)
    # A token stays while those before it have not yet reached top_p; so the first always does.
    kept = kept.masked_fill(mass - shares >= rules.top_p, -inf)
    drawn = ids.gather(-1, _pick(kept, rules, has_min_p))
    return drawn.squeeze(-1), is_enough.squeeze(-1)


def _likeliest(scores: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """(scores, ids) `[rows, candidates]`, best first.

    On CPUs `topk` over a whole vocabulary costs more than a small model. The k-th largest of the
    maxima of blocks is at most the k-th largest score, so only what reaches it is sorted.
    """
    num_whole = scores.shape[-1] // BLOCK_TOKENS * BLOCK_TOKENS
    if not is_at_hand(scores) or 2 * num_candidates * BLOCK_TOKENS > num_whole:
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


def _pick(scores: Tensor, rules: _Rules, has_min_p: bool) -> Tensor:
    """Apply min_p to scores whose best is 0, then draw a column of each row in proportion to its
    probability: [rows, 1]."""
    if has_min_p:
        scores = scores.masked_fill(scores < rules.min_p.log(), -inf)
    # First the block of tokens is drawn, then the token inside it: sums of float64 are what costs.
    weights = F.pad(scores.exp(), (0, -scores.shape[-1] % BLOCK_TOKENS))
    blocks = weights.view(len(scores), -1, BLOCK_TOKENS)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    targets = rules.uniform * sums[:, -1:]
    # right=True skips what has probability 0, whose cumulative value equals its neighbour's.
    block = torch.searchsorted(sums, targets, right=True)
    targets = targets - F.pad(sums, (1, 0)).gather(-1, block)
    inside = blocks[torch.arange(len(scores), device=scores.device), block.flatten()]
    inside = inside.cumsum(-1, dtype=torch.float64)
    # The two sums of a block may differ in their last bit: the target stays below this one's.
    targets = torch.minimum(targets, inside[:, -1:] * (1 - 2**-50))
    return block * BLOCK_TOKENS + torch.searchsorted(inside, targets, right=True)


def uniform(sequence: Sequence) -> float:
    """The random number, inside (0, 1), that chooses the sequence's next token.

    A function of seed, choice and position alone, so that a seeded answer does not depend on
    what else is in the batch, nor on preemption.
    """
    key = pack("<qqq", sequence.seed, sequence.choice, len(sequence.token_ids))
    return (int.from_bytes(blake2b(key, digest_size=4).digest(), "little") + 0.5) / 2**32


def _logprobs(logits: Tensor, token_ids: Tensor, rows: list[int]) -> list[Tensor]:
    """By the model's own distribution: of the chosen tokens [rows], and the likeliest with their
    ids [rows, top]. Nothing for no rows."""
    if not rows:
        return []
    at = send(torch.tensor(rows), logits.device)
    logprobs = _select(logits, rows, at).log_softmax(-1)
    values, ids = logprobs.topk(min(MAX_LOGPROBS, logits.shape[-1]))
    return [logprobs.gather(-1, token_ids[at].unsqueeze(-1)).squeeze(-1), values, ids]
