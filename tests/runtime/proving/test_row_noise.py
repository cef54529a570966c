"""Rounding may choose a mixture's experts; faults are still faults."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from runtime.execution.attention import AttentionBackend, AttentionMetadata, AttentionSpec
from runtime.execution.reference import ReferenceAttention
from runtime.importing.exported import load_exported
from runtime.importing.huggingface import HuggingFaceDecoder, load_decoder
from runtime.proving import row_noise
from runtime.proving.exported_original import ExportedOriginal
from runtime.proving.original import (
    TOLERANCE_FACTOR,
    LoadedOriginal,
    PromptPlan,
    References,
    ask,
    consult_original,
)
from runtime.proving.row_noise import MAX_SAMPLES, OtherRounding, RowNoise
from tests.runtime.decoders import WINDOW, save_decoder
from tests.runtime.families import FAMILIES
from tests.runtime.proving.test_decoder import (
    ForgetsOldest,
    LosesLastToken,
    ShiftsPositions,
    SwapsLayers,
    failed,
    prove,
)

CONFIG = {family.name: family.config for family in FAMILIES}
MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3"]
SEEDS = [16, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 7, 17, 24))]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# --- of real mixtures -------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # of transformers' own
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_are_equal_in_bfloat16(
    tmp_path: Path, family: str, seed: int, request: pytest.FixtureRequest
) -> None:
    if seed != SEEDS[0] and "slow" not in request.config.option.markexpr:
        pytest.skip("more seeds run with -m slow (make soak)")
    save_decoder(family, tmp_path, torch.bfloat16, seed=seed, **CONFIG[family])
    proof = prove(tmp_path, load_decoder(tmp_path))
    assert proof.verdict == "equal", failed(proof)
    assert {check.form for check in proof.checks} == {"eager, float32", "eager, bfloat16"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    config = {**CONFIG["mixtral"], "sliding_window": WINDOW}
    save_decoder("mixtral", path, torch.bfloat16, **config)
    return path


@pytest.fixture(scope="module")
def drawn() -> dict[object, list[Tensor]]:
    """The original's logits in other roundings, by what was asked and how often before."""
    return {}


@pytest.fixture
def drawn_once(drawn: dict[object, list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs of one original draw the same samples: keep them for the next test."""
    num_asked = itertools.count()

    def ask_once(
        loaded: LoadedOriginal, questions: Sequence[tuple[list[int], tuple[int, ...]]]
    ) -> list[Tensor]:
        key = (next(num_asked), repr(questions))
        if key not in drawn:
            drawn[key] = ask(loaded, questions)
        return drawn[key]

    monkeypatch.setattr(row_noise, "ask", ask_once)


def only_in_half(fault: type[ReferenceAttention]) -> type[ReferenceAttention]:
    """The fault of a kernel for bfloat16 alone: float32 tells nothing of it."""

    class Faulty(fault):
        def write(
            self,
            keys: Tensor,
            values: Tensor,
            key_cache: Tensor,
            value_cache: Tensor,
            slots: Tensor,
        ) -> None:
            kind = ReferenceAttention if keys.dtype == torch.float32 else fault
            kind.write(self, keys, values, key_cache, value_cache, slots)

        def attend(
            self,
            query: Tensor,
            key_cache: Tensor,
            value_cache: Tensor,
            metadata: AttentionMetadata,
            spec: AttentionSpec,
        ) -> Tensor:
            kind = ReferenceAttention if query.dtype == torch.float32 else fault
            return kind.attend(self, query, key_cache, value_cache, metadata, spec)

    return Faulty


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("fault", [ForgetsOldest, LosesLastToken])
def test_a_backend_that_is_faulty_in_half_alone_is_caught(
    mixture: Path, fault: type[ReferenceAttention]
) -> None:
    backend: Callable[[], AttentionBackend] = only_in_half(fault)
    proof = prove(mixture, load_decoder(mixture), backend())
    assert proof.verdict == "different"
    assert {check.form for check in proof.checks if not check.is_equal} == {"eager, bfloat16"}


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize("fault", [SwapsLayers, ShiftsPositions])
def test_a_model_that_is_faulty_in_half_alone_is_caught(
    mixture: Path, fault: type[HuggingFaceDecoder]
) -> None:
    decoder = load_decoder(mixture)
    decoder.__class__ = fault
    proof = prove(mixture, decoder)
    assert proof.verdict == "different"
    assert {check.form for check in proof.checks if not check.is_equal} == {"eager, bfloat16"}


def test_what_differs_in_float32_is_not_sampled(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowNoise, "sample_for", lambda *_: pytest.fail("sampled for nothing"))
    proof = prove(mixture, load_decoder(mixture), ForgetsOldest())
    assert proof.verdict == "different"
    assert proof.notes == []


# --- of an original whose experts are known -----------------------------------------------


class TwoExperts:
    """Token 0 goes to either expert as rounding will have it, the others always to the first."""

    num_parameters = min_tokens = 1
    vocab_size = 8
    recomputes = True

    def __init__(self) -> None:
        self.loaded: list[torch.dtype] = []

    def load(self, dtype: torch.dtype) -> LoadedOriginal:
        self.loaded.append(dtype)
        return LoadedTwoExperts(dtype)


class LoadedTwoExperts:
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        generator = torch.Generator().manual_seed(0)
        self._table = torch.rand(8, 16, generator=generator).add_(1).to(dtype)
        self._experts = torch.randn(2, 16, 16, generator=generator).to(dtype)

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        rows = functional.embedding(torch.tensor(tokens), self._table)
        # Of equal activations, so that every rounding decides anew; 1 is far from a tie.
        score = (rows.float() - self._table[tokens].float()).sum(-1)
        score += torch.tensor([float(token > 0) for token in tokens])
        first, second = (functional.linear(rows, expert) for expert in self._experts)
        return torch.where((score >= 0)[:, None], first, second)

    def continue_greedily(self, tokens: list[int], num_new: int) -> list[int]:
        return [(tokens[-1] + at) % 8 for at in range(num_new)]


def two_experts(dtype: torch.dtype) -> tuple[TwoExperts, References]:
    original = TwoExperts()
    plan = PromptPlan((20, 3), 4)
    return original, consult_original(original, lambda _: plan, [dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_many_rows_may_jump_as_in_the_original(dtype: torch.dtype) -> None:
    original, references = two_experts(dtype)
    tokens = [token for trace in references.traces for token in trace.tokens]
    is_tied = torch.tensor(tokens) == 0
    assert 0 < is_tied.sum() < len(tokens) / 2
    noise = RowNoise(original, dtype, references)
    rows, own = torch.arange(len(tokens)), references.deviations_of[dtype]
    jump = 0.1 * references.logit_range
    assert own.max() < jump / TOLERANCE_FACTOR
    errors = torch.where(is_tied, jump, own)

    assert not noise.explains(rows, errors)
    noise.sample_for([(rows, errors)])
    assert 0 < noise.num_samples < MAX_SAMPLES
    assert noise.explains(rows, errors)
    assert original.loaded.count(dtype) == 2  # for itself, and once for all samples

    everywhere = torch.full_like(errors, jump)
    noise.sample_for([(rows, everywhere)])
    assert noise.num_samples == MAX_SAMPLES
    assert not noise.explains(rows, everywhere)


def test_nothing_is_sampled_without_need() -> None:
    original, references = two_experts(torch.bfloat16)
    noise = RowNoise(original, torch.bfloat16, references)
    own = references.deviations_of[torch.bfloat16]
    rows = torch.arange(len(own))
    noise.sample_for([(rows, own.flip(0)), (rows[:1], own[:1])])
    noise.sample_for([(rows, torch.full_like(own, torch.inf))])  # which nothing explains
    assert noise.num_samples == 0
    assert not noise.explains(rows, torch.full_like(own, torch.inf))


def test_products_are_off_by_their_last_place_and_the_same_each_time() -> None:
    left, right = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()

    def product(seed: int, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(), OtherRounding(torch.bfloat16, seed):
            return left.to(dtype) @ right.to(dtype)

    exact = left @ right
    one, same, other = (product(seed, torch.bfloat16) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.allclose(one, exact, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)
    assert torch.equal(product(1, torch.float32), left.float() @ right.float())


class Next(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(12, 8)
        self.head = torch.nn.Linear(8, 12)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def test_an_exported_original_is_rounded_otherwise_too(tmp_path: Path) -> None:
    path = tmp_path / "next.pt2"
    length = torch.export.Dim("length", min=2, max=64)
    example = (torch.zeros(1, 6, dtype=torch.long),)
    program = torch.export.export(
        Next().eval().bfloat16(), example, dynamic_shapes={"input_ids": {1: length}}
    )
    torch.export.save(program, path)
    loaded = ExportedOriginal(load_exported(path)).load(torch.bfloat16)
    plain = loaded.logits([1, 2, 3])
    with OtherRounding(torch.bfloat16, seed=0):
        assert not torch.equal(loaded.logits([1, 2, 3]), plain)
    assert torch.equal(loaded.logits([1, 2, 3]), plain)
