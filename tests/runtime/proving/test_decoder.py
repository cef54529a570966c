"""The proof holds for what is right and fails for each way of being a little wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.execution.attention import AttentionBackend, AttentionMetadata, AttentionSpec
from runtime.execution.reference import ReferenceAttention
from runtime.execution.runner import Attend
from runtime.importing.huggingface import HuggingFaceDecoder, load_decoder
from runtime.proving import decoder as proving
from runtime.proving.decoder import DecoderProof, prove_decoder
from tests.runtime.decoders import WINDOW, save_decoder

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads and a sliding window in one model."""
    path = tmp_path_factory.mktemp("mistral")
    save_decoder("mistral", path)
    return path


def prove(
    directory: Path, decoder: HuggingFaceDecoder, backend: AttentionBackend | None = None
) -> DecoderProof:
    return prove_decoder(directory, decoder, backend=backend, block_size=BLOCK_SIZE)


def failed(proof: DecoderProof) -> set[str]:
    return {check.name.split()[0] for check in proof.checks if not check.is_equal}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mixtral"])
def test_a_right_decoder_is_equal(tmp_path: Path, family: str) -> None:
    save_decoder(family, tmp_path)
    proof = prove(tmp_path, load_decoder(tmp_path))
    assert proof.verdict == "equal"
    assert [check.name for check in proof.checks] == [
        "paged (float32)",
        "chunked (float32)",
        "batched (float32)",
        "prefix (float32)",
    ]
    for check in proof.checks:
        assert check.error is not None
        assert check.tolerance is not None
        assert 0 < check.error <= check.tolerance
    assert proof.notes == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_judged_on_logits_and_its_form_in_float32(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    save_decoder("qwen3", tmp_path, dtype)
    proof = prove(tmp_path, load_decoder(tmp_path))
    assert proof.verdict == "equal"
    name = str(dtype).removeprefix("torch.")
    assert {check.name for check in proof.checks} >= {"paged (float32)", f"paged ({name})"}
    wide = {check.name: check.tolerance or 0 for check in proof.checks}
    assert wide[f"paged ({name})"] > 50 * wide["paged (float32)"]


# --- planted faults ---------------------------------------------------------------------


class ForgetsOldest(ReferenceAttention):
    """The window's mask is off by one."""

    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        window = None if spec.sliding_window is None else spec.sliding_window - 1
        spec = replace(spec, sliding_window=window)
        return super().attend(query, key_cache, value_cache, metadata, spec)


class LooksAhead(ReferenceAttention):
    """Every token but the last sees the one after it."""

    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        shifted = torch.cat([query[1:], query[-1:]])
        later = super().attend(shifted, key_cache, value_cache, metadata, spec)
        right = super().attend(query, key_cache, value_cache, metadata, spec)
        return torch.cat([later[:-1] * 0.001 + right[:-1] * 0.999, right[-1:]])


class LosesLastToken(ReferenceAttention):
    """The newest key of a step is never stored."""

    def write(
        self, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        super().write(keys[:-1], values[:-1], key_cache, value_cache, slots[:-1])


class ReadsStaleBlock(ReferenceAttention):
    """A sequence's second block is read where its first is: valid memory, wrong content."""

    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        tables = metadata.block_tables.clone()
        if tables.shape[1] > 2:
            tables[:, 1] = tables[:, 0]
        metadata = replace(metadata, block_tables=tables)
        return super().attend(query, key_cache, value_cache, metadata, spec)


class MixesNeighbours(ReferenceAttention):
    """With more than one sequence, the first reads the second's blocks."""

    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        tables = metadata.block_tables.clone()
        if len(tables) > 1:
            tables[0, 0] = tables[1, 0]
        metadata = replace(metadata, block_tables=tables)
        return super().attend(query, key_cache, value_cache, metadata, spec)


FAULTS: list[tuple[type[AttentionBackend], set[str]]] = [
    (ForgetsOldest, {"paged", "chunked", "batched", "prefix"}),
    (LooksAhead, {"paged", "chunked", "batched", "prefix"}),
    (LosesLastToken, {"paged", "chunked", "batched", "prefix"}),
    (ReadsStaleBlock, {"paged", "chunked", "batched", "prefix"}),
    (MixesNeighbours, {"batched"}),
]


@pytest.mark.parametrize(("fault", "caught_by"), FAULTS, ids=lambda f: getattr(f, "__name__", ""))
def test_a_faulty_backend_is_caught(
    directory: Path, fault: Callable[[], AttentionBackend], caught_by: set[str]
) -> None:
    proof = prove(directory, load_decoder(directory), fault())
    assert proof.verdict == "different"
    assert failed(proof) == caught_by


class SwapsLayers(HuggingFaceDecoder):
    """Two layers of the same shape exchange their caches' weights."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, sample_indices: Tensor, attend: Attend
    ) -> Tensor:
        layers = self.module.get_submodule("model.layers")
        assert isinstance(layers, torch.nn.ModuleList)
        layers[0], layers[1] = layers[1], layers[0]
        try:
            return super().forward(token_ids, positions, sample_indices, attend)
        finally:
            layers[0], layers[1] = layers[1], layers[0]


class ShiftsPositions(HuggingFaceDecoder):
    """Tokens beyond the first block are placed one too far."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, sample_indices: Tensor, attend: Attend
    ) -> Tensor:
        positions = positions + (positions >= BLOCK_SIZE)
        return super().forward(token_ids, positions, sample_indices, attend)


@pytest.mark.parametrize("fault", [SwapsLayers, ShiftsPositions])
def test_a_faulty_model_is_caught(directory: Path, fault: type[HuggingFaceDecoder]) -> None:
    decoder = load_decoder(directory)
    decoder.__class__ = fault
    proof = prove(directory, decoder)
    assert proof.verdict == "different"
    assert failed(proof) == {"paged", "chunked", "batched", "prefix"}


def test_a_changed_weight_is_caught(directory: Path) -> None:
    decoder = load_decoder(directory)
    with torch.no_grad():
        decoder.module.get_submodule("model.layers.2.mlp.up_proj").weight.mul_(1.001)
    assert prove(directory, decoder).verdict == "different"


# --- limits -----------------------------------------------------------------------------


def test_a_window_too_long_to_exercise_is_noted(tmp_path: Path) -> None:
    save_decoder("mistral", tmp_path, sliding_window=200)
    proof = prove_decoder(tmp_path, load_decoder(tmp_path), block_size=16, budget_seconds=0.0)
    assert proof.verdict == "equal"
    assert "sliding window of 200 tokens" in proof.notes[0]


def test_a_tiny_context_is_proved_within_it(tmp_path: Path) -> None:
    save_decoder("llama", tmp_path, max_position_embeddings=6)
    assert prove_decoder(tmp_path, load_decoder(tmp_path)).verdict == "equal"


def test_too_little_memory_leaves_it_unproved(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving, "available_bytes", lambda: 1000)
    proof = prove(directory, load_decoder(directory))
    assert proof.verdict == "unproved"
    assert "memory" in proof.notes[0]


def test_without_float64_the_floor_is_the_tolerance(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder(directory)
    num_parameters = sum(parameter.numel() for parameter in decoder.module.parameters())
    monkeypatch.setattr(proving, "available_bytes", lambda: 10 * num_parameters)
    proof = prove(directory, decoder)
    assert proof.verdict == "equal"
    assert "float64" in proof.notes[0]


def test_progress_never_falls(directory: Path) -> None:
    seen: list[float] = []
    prove_decoder(
        directory,
        load_decoder(directory),
        block_size=BLOCK_SIZE,
        on_progress=lambda _, fraction: seen.append(fraction),
    )
    assert seen == sorted(seen)
    assert WINDOW > BLOCK_SIZE  # the window test above crosses a block
