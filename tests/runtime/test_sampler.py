"""Each sampling rule against its plain definition, alone and beside other sequences."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from runtime.execution import sampler as sampler_module
from runtime.execution.sampler import SampledToken, Sampler, SamplingFailure, uniform
from runtime.protocol import SamplingParams
from runtime.scheduling.sequence import Sequence
from tests.runtime.execution.tape import Tape

VOCAB_SIZE = 50


def sequence_with(
    *,
    prompt: tuple[int, ...] = (1, 2),
    generated: tuple[int, ...] = (),
    seed: int = 0,
    **rules: Any,
) -> Sequence:
    return Sequence(
        sequence_id=0,
        request_id="r",
        token_ids=[*prompt, *generated],
        num_prompt_tokens=len(prompt),
        max_tokens=100,
        sampling=SamplingParams(**rules),
        cache_salt=b"",
        seed=seed,
    )


def random_logits(num_rows: int, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(7)) * 3


def naive_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution of one row by the letter of the definitions, in float64."""
    scores = logits.double() / params.temperature
    if params.top_k > 0:
        limit = scores.sort(descending=True).values[min(params.top_k, len(scores)) - 1]
        scores[scores < limit] = -math.inf
    if params.top_p < 1:
        mass = 0.0
        kept = []
        for token in scores.argsort(descending=True).tolist():
            kept.append(token)
            mass += float(scores.softmax(-1)[token])
            if mass >= params.top_p:
                break
        dropped = torch.ones_like(scores, dtype=torch.bool)
        dropped[kept] = False
        scores[dropped] = -math.inf
    probabilities = scores.softmax(-1)
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def ids_of(sampled: list[SampledToken | SamplingFailure]) -> list[int]:
    assert all(isinstance(each, SampledToken) for each in sampled)
    return [each.token_id for each in sampled if isinstance(each, SampledToken)]


def draw_frequencies(logits: torch.Tensor, num_draws: int, **rules: Any) -> torch.Tensor:
    rows = logits.expand(num_draws, -1)
    sequences = [sequence_with(seed=seed, **rules) for seed in range(num_draws)]
    counts = Counter(ids_of(Sampler().sample(rows, sequences)))
    return torch.tensor([counts[token] / num_draws for token in range(logits.shape[-1])])


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.01},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"top_k": 1000, "top_p": 0.999},
    ],
)
def test_draws_follow_the_naive_distribution(rules: dict[str, Any]) -> None:
    logits = random_logits(1)[0]
    expected = naive_probabilities(logits, SamplingParams(**rules))
    seen = draw_frequencies(logits, 20_000, **rules)
    assert not seen[expected == 0].any(), "a token was drawn that the rules exclude"
    # Five standard deviations of a frequency over 20,000 draws.
    tolerance = 5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-4
    assert ((seen - expected).abs() <= tolerance).all()


def test_top_p_sorts_the_whole_row_when_the_candidates_do_not_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flat = random_logits(1, 400) * 0.1
    sequences = [sequence_with(top_p=0.9, seed=seed) for seed in range(300)]
    expected = ids_of(Sampler().sample(flat.expand(300, -1), sequences))
    monkeypatch.setattr(sampler_module, "NUM_CANDIDATES", 16)
    assert ids_of(Sampler().sample(flat.expand(300, -1), sequences)) == expected
    assert len(set(expected)) > 100


def test_greedy_takes_the_best_token_whatever_is_beside_it() -> None:
    logits = random_logits(4)
    sequences = [
        sequence_with(temperature=0.0),
        sequence_with(temperature=1.0),
        sequence_with(temperature=0.0, top_k=3),
        sequence_with(temperature=1e-7, top_p=0.5),
    ]
    sampled = ids_of(Sampler().sample(logits, sequences))
    best = logits.argmax(-1).tolist()
    assert [sampled[row] for row in (0, 2, 3)] == [best[row] for row in (0, 2, 3)]


def test_a_seeded_sequence_does_not_depend_on_its_neighbours() -> None:
    logits = random_logits(6)
    rules = [{"top_p": 0.9}, {}, {"top_k": 4}, {"temperature": 0.0}, {"min_p": 0.2}, {}]
    sequences = [sequence_with(seed=11 + row, **each) for row, each in enumerate(rules)]
    together = ids_of(Sampler().sample(logits, sequences))
    alone = [
        ids_of(Sampler().sample(logits[row : row + 1], [sequence]))[0]
        for row, sequence in enumerate(sequences)
    ]
    assert together == alone


def test_equal_scores_fall_alike_whatever_is_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # In bfloat16 many scores are equal, and how many candidates are taken decides their order.
    monkeypatch.setattr(sampler_module, "NUM_CANDIDATES", 64)
    logits = random_logits(2, 8000).bfloat16().float()
    for seed in range(40):
        sequence = sequence_with(seed=seed, top_p=0.3)
        beside = sequence_with(top_k=700)
        (alone,) = ids_of(Sampler().sample(logits[:1], [sequence]))
        assert ids_of(Sampler().sample(logits, [sequence, beside]))[0] == alone


def test_the_random_number_depends_on_seed_choice_and_position_only() -> None:
    first = sequence_with(seed=5)
    same = sequence_with(seed=5, prompt=(8, 9))
    assert uniform(first) == uniform(same)
    others = [sequence_with(seed=6), sequence_with(seed=5, generated=(1,)), sequence_with(seed=5)]
    others[-1].choice = 1
    assert len({uniform(each) for each in [first, *others]}) == 4


def test_frequency_and_presence_count_generated_tokens_only() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 3], logits[0, 4], logits[0, 5] = 3.0, 2.9, 2.0
    prompt_only = sequence_with(prompt=(3, 3, 3), temperature=0.0, frequency_penalty=1.0)
    assert ids_of(Sampler().sample(logits, [prompt_only])) == [3]
    prompt_only = sequence_with(prompt=(3, 3, 3), temperature=0.0, presence_penalty=1.0)
    assert ids_of(Sampler().sample(logits, [prompt_only])) == [3]
    frequency = sequence_with(generated=(3, 4, 3, 4), temperature=0.0, frequency_penalty=0.6)
    assert ids_of(Sampler().sample(logits, [frequency])) == [5]
    presence = sequence_with(generated=(3, 3, 3), temperature=0.0, presence_penalty=0.5)
    assert ids_of(Sampler().sample(logits, [presence])) == [4]


def test_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(1)
    ids = [1, 2, 2, 7, int(logits.argmax()), 40]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([ids]), logits.clone())
    best = int(expected.argmax())
    sequence = sequence_with(
        prompt=tuple(ids[:3]), generated=tuple(ids[3:]), temperature=0.0, repetition_penalty=1.7
    )
    assert best != int(logits.argmax())
    assert ids_of(Sampler().sample(logits, [sequence])) == [best]


def test_counts_are_kept_up_to_date_as_the_answer_grows() -> None:
    sampler, logits = Sampler(), random_logits(1)
    rules = {"temperature": 0.0, "frequency_penalty": 0.9, "presence_penalty": 0.4}
    growing = sequence_with(repetition_penalty=1.2, **rules)
    for _ in range(30):
        (token_id,) = ids_of(sampler.sample(logits, [growing]))
        generated = tuple(growing.token_ids[2:])
        fresh = sequence_with(generated=generated, repetition_penalty=1.2, **rules)
        assert ids_of(Sampler().sample(logits, [fresh])) == [token_id]
        growing.token_ids.append(token_id)
    assert len(set(growing.token_ids)) > 10
    del growing
    assert len(sampler._counts) == 0, "counts must die with their sequence"


def test_logit_bias_bans_and_forces() -> None:
    logits = random_logits(2)
    best = int(logits[0].argmax())
    sequences = [
        sequence_with(temperature=0.0, logit_bias={best: -100.0}),
        sequence_with(temperature=1.0, logit_bias={33: 100.0}),
    ]
    banned, forced = ids_of(Sampler().sample(logits, sequences))
    assert banned == int(logits[0].topk(2).indices[1])
    assert forced == 33


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = random_logits(2)
    before = logits.clone()
    sequences = [
        sequence_with(temperature=0.0, logprobs=3, logit_bias={17: 100.0}),
        sequence_with(temperature=0.0),
    ]
    first, second = Sampler().sample(logits, sequences)
    assert isinstance(first, SampledToken)
    assert isinstance(second, SampledToken)
    expected = logits[0].double().log_softmax(-1)
    assert first.token_id == 17
    assert first.logprob == pytest.approx(float(expected[17]), abs=1e-5)
    assert [token for token, _ in first.top] == expected.topk(3).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(expected.topk(3).values.tolist())
    assert (second.logprob, second.top) == (None, [])
    assert torch.equal(logits, before), "the logits belong to the caller"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf, "all -inf"])
def test_bad_logits_fail_their_sequence_only(temperature: float, poison: float | str) -> None:
    logits = random_logits(3)
    good = ids_of(
        Sampler().sample(logits, [sequence_with(temperature=temperature) for _ in range(3)])
    )
    if isinstance(poison, str):
        logits[1] = -math.inf
    else:
        logits[1, 20] = poison
    sequences = [sequence_with(temperature=temperature, logprobs=1) for _ in range(3)]
    first, failed, third = Sampler().sample(logits, sequences)
    assert isinstance(failed, SamplingFailure)
    assert ids_of([first, third]) == [good[0], good[2]]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((1, VOCAB_SIZE), -math.inf)
    logits[0, 7] = logits[0, 9] = 0.0
    for rules in ({}, {"top_p": 0.99}, {"top_k": 40}):
        seen = draw_frequencies(logits[0], 500, **rules)
        assert set(seen.nonzero().flatten().tolist()) == {7, 9}


@pytest.mark.parametrize("rules", [{}, {"top_p": 0.9}])
def test_a_low_temperature_does_not_overflow(rules: dict[str, Any]) -> None:
    logits = random_logits(1) * 1e37
    sequence = sequence_with(temperature=2e-5, **rules)
    assert ids_of(Sampler().sample(logits, [sequence])) == [int(logits.argmax())]


def test_the_likeliest_of_a_large_vocabulary_are_those_of_a_full_sort() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 40_001) * 3
    scores[1] = scores[1].round()  # many equal scores
    scores[2] = 0.0
    scores[3, 100:] = -torch.inf
    kept, ids = sampler_module._likeliest(scores, 1024)
    expected = scores.sort(descending=True, stable=True)
    assert torch.equal(kept, expected.values[:, :1024])
    assert torch.equal(ids, expected.indices[:, :1024])


class Waiting(TorchFunctionMode):
    """Counts what brings numbers of a device to the processor: `fetch`; refuses all else that would
    wait for it."""

    ASKS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.num_waits = 0
        self._fetched: list[torch.Tensor] = []

    def fetch(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        self.num_waits += 1
        self._fetched = [tensor.double() for tensor in tensors]
        return self._fetched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_asking = func.__name__ in self.ASKS
        is_here = any(args[0] is each for each in self._fetched) if is_asking else True
        assert is_here, f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rules", [{}, {"top_p": 0.999, "temperature": 9.0}], ids=["", "again"])
def test_the_device_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch, rules: dict[str, Any]
) -> None:
    """As on a device, whose numbers are not at hand; again only for what candidates lack."""
    sequences = [
        sequence_with(temperature=0.0),
        sequence_with(temperature=0.0, logprobs=3, generated=(4, 5), repetition_penalty=1.3),
        sequence_with(logit_bias={3: 5.0}, generated=(4, 4), frequency_penalty=0.5),
        sequence_with(min_p=0.1),
        sequence_with(top_p=0.6, logprobs=0),
        sequence_with(top_k=5, temperature=0.3),
        sequence_with(**rules),
    ]
    monkeypatch.setattr(sampler_module, "NUM_CANDIDATES", 20)
    logits = random_logits(len(sequences))
    expected = ids_of(Sampler().sample(logits, sequences))
    waiting = Waiting()
    monkeypatch.setattr(sampler_module, "is_at_hand", lambda _: False)
    monkeypatch.setattr(sampler_module, "fetch", waiting.fetch)
    # A tape refuses operators whose results have a size that only the device knows.
    with waiting, Tape(lambda _: None):
        found = Sampler().sample(logits, sequences)
    assert ids_of(found) == expected
    assert waiting.num_waits == (2 if rules else 1)
