"""The proof holds for what is right and fails for each way of being a little wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.cache.pool import KvPool
from runtime.execution.attention import AttentionBackend, AttentionMetadata, AttentionSpec
from runtime.execution.reference import ReferenceAttention
from runtime.execution.runner import Attend, Runner
from runtime.importing.huggingface import HuggingFaceDecoder, load_decoder
from runtime.proving import decoder as proving
from runtime.proving.decoder import DecoderProof, DecoderProver
from runtime.proving.forms import paged_form
from runtime.proving.huggingface_original import HuggingFaceOriginal
from runtime.proving.replay import Replay
from runtime.scheduling.plan import BlockMoves
from tests.runtime.decoders import WINDOW, save_decoder

BLOCK_SIZE = 16
ALL = ["paged", "chunked", "batched", "sampled", "prefix", "partial", "preempted", "swapped"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads and a sliding window in one model."""
    path = tmp_path_factory.mktemp("mistral")
    save_decoder("mistral", path)
    return path


def prove(
    directory: Path,
    decoder: HuggingFaceDecoder,
    backend: AttentionBackend | None = None,
    block_size: int = BLOCK_SIZE,
    budget_seconds: float = 30.0,
) -> DecoderProof:
    def load(dtype: torch.dtype) -> HuggingFaceDecoder:
        return load_decoder(directory, dtype=dtype)

    form = paged_form(decoder, load, block_size=block_size, backend=backend)
    original = HuggingFaceOriginal(directory)
    prover = DecoderProver(original, block_size=block_size, budget_seconds=budget_seconds)
    return prover.prove(form)


def failed(proof: DecoderProof) -> set[str]:
    return {check.name for check in proof.checks if not check.is_equal}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mixtral"])
def test_a_right_decoder_is_equal(tmp_path: Path, family: str) -> None:
    save_decoder(family, tmp_path)
    proof = prove(tmp_path, load_decoder(tmp_path))
    assert proof.verdict == "equal"
    assert [check.name for check in proof.checks] == ALL
    for check in proof.checks:
        assert check.form == "eager, float32"
        assert check.num_judged == check.num_same > 50
        assert check.seconds is not None
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
    wide = {check.form: check.tolerance or 0 for check in proof.checks}
    assert set(wide) == {"eager, float32", f"eager, {name}"}
    assert wide[f"eager, {name}"] > 50 * wide["eager, float32"]
    judged = {check.form: check.num_judged for check in proof.checks}
    assert judged[f"eager, {name}"] is None


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


class ScalesWrong(ReferenceAttention):
    """Scores are scaled as if heads were a little narrower."""

    def attend(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        spec = replace(spec, scale=spec.scale * 1.01)
        return super().attend(query, key_cache, value_cache, metadata, spec)


class WritesToWrongSlot(ReferenceAttention):
    """The first key of each step lands one slot further, where the next one overwrites it."""

    def write(
        self, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        slots = slots.clone()
        slots[0] += -1 if slots[0] % BLOCK_SIZE == BLOCK_SIZE - 1 else 1
        super().write(keys, values, key_cache, value_cache, slots)


FAULTS: list[tuple[type[AttentionBackend], set[str]]] = [
    (ForgetsOldest, set(ALL)),
    (LooksAhead, set(ALL)),
    (LosesLastToken, set(ALL)),
    (ReadsStaleBlock, set(ALL)),
    (ScalesWrong, set(ALL)),
    (WritesToWrongSlot, set(ALL)),
    (MixesNeighbours, {"batched", "sampled", "preempted", "swapped"}),
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
    assert failed(proof) == set(ALL)


def test_a_missing_copy_of_a_partial_block_is_caught(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KvPool, "copy_blocks", lambda *_: None)
    proof = prove(directory, load_decoder(directory))
    assert proof.verdict == "different"
    assert failed(proof) == {"partial"}


def test_a_shared_partial_block_that_both_write_to_is_caught(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share_all(self: Replay, source: str, target: str, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // self.block_size)
        share(self, source, target, num_blocks * self.block_size)
        self._sequences[target].num_tokens = num_tokens

    share = Replay.share
    monkeypatch.setattr(Replay, "share", share_all)
    proof = prove(directory, load_decoder(directory))
    assert failed(proof) == {"partial"}


def in_wrong_order(moves: BlockMoves) -> BlockMoves:
    hosts = [host for host, _ in moves.swap_ins]
    blocks = [block for _, block in reversed(moves.swap_ins)]
    return replace(moves, swap_ins=list(zip(hosts, blocks, strict=True)))


def without_the_last(moves: BlockMoves) -> BlockMoves:
    return replace(moves, swap_outs=moves.swap_outs[:-1])


@pytest.mark.parametrize("fault", [in_wrong_order, without_the_last])
def test_blocks_that_do_not_come_back_as_they_left_are_caught(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[BlockMoves], BlockMoves],
) -> None:
    move = Runner.move
    monkeypatch.setattr(Runner, "move", lambda self, moves: move(self, fault(moves)))
    proof = prove(directory, load_decoder(directory))
    assert failed(proof) == {"swapped"}


def test_a_changed_weight_is_caught(directory: Path) -> None:
    decoder = load_decoder(directory)
    with torch.no_grad():
        decoder.module.get_submodule("model.layers.2.mlp.up_proj").weight.mul_(1.001)
    assert prove(directory, decoder).verdict == "different"


# --- limits -----------------------------------------------------------------------------


def test_a_window_too_long_to_exercise_is_noted(tmp_path: Path) -> None:
    save_decoder("mistral", tmp_path, sliding_window=200)
    proof = prove(tmp_path, load_decoder(tmp_path), budget_seconds=0.0)
    assert proof.verdict == "equal"
    assert "sliding window of 200 tokens" in proof.notes[0]


def test_a_tiny_context_is_proved_within_it(tmp_path: Path) -> None:
    save_decoder("llama", tmp_path, max_position_embeddings=6)
    assert prove(tmp_path, load_decoder(tmp_path), block_size=32).verdict == "equal"


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
    form = paged_form(load_decoder(directory), lambda dtype: load_decoder(directory, dtype=dtype))
    prover = DecoderProver(HuggingFaceOriginal(directory))
    prover.prove(form, lambda _, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert WINDOW > BLOCK_SIZE  # the window test above crosses a block
