"""The proof of embedders: it holds for sound ones and catches faults."""

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from runtime.execution import pooling
from runtime.importing.embedder import Embedder, load_embedder
from runtime.importing.program import ImportFailure
from runtime.proving.embedder import prove_embedder
from runtime.proving.embedder_speed import measure_embedder
from tests.runtime.embedders import bert, fnet, qwen3, save_embedder


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder") / "bert")


def failed(directory: Path, embedder: Embedder) -> set[str]:
    """The names of the checks that do not hold."""
    proof = prove_embedder(directory, embedder)
    return {check.name.partition(" (")[0] for check in proof.checks if not check.is_equal}


def test_a_sound_embedder_is_equal_and_may_be_padded(directory: Path):
    proof = prove_embedder(directory, load_embedder(directory))
    assert (proof.verdict, proof.batching, proof.notes) == ("equal", "padded", [])
    assert {check.name for check in proof.checks} == {
        "alone (float32)",
        "equal lengths (float32)",
        "padded (float32)",
    }
    for check in proof.checks:
        assert check.error is not None
        assert check.tolerance is not None
        assert 0 < check.error < check.tolerance < 1e-4


def test_half_precision_is_proved_as_served_and_in_float32(tmp_path: Path):
    directory = save_embedder(tmp_path, bert().to(torch.bfloat16))
    proof = prove_embedder(directory, load_embedder(directory))
    assert (proof.verdict, proof.batching) == ("equal", "padded")
    tolerances = {check.name: check.tolerance or 0 for check in proof.checks}
    assert tolerances["padded (float32)"] < 1e-4 < tolerances["padded (bfloat16)"] < 0.2


def test_a_causal_embedder_of_the_last_token_is_equal(tmp_path: Path):
    directory = save_embedder(tmp_path, qwen3(), pooling="lasttoken")
    proof = prove_embedder(directory, load_embedder(directory))
    assert (proof.verdict, proof.batching) == ("equal", "padded")


def test_where_padding_changes_vectors_only_equal_lengths_share_runs(tmp_path: Path):
    directory = save_embedder(tmp_path, fnet())
    proof = prove_embedder(directory, load_embedder(directory))
    assert (proof.verdict, proof.batching) == ("equal", "equal_lengths")
    assert "equal lengths" in proof.notes[0]


def test_a_mask_that_is_off_by_one_is_caught(directory: Path, monkeypatch: pytest.MonkeyPatch):
    embedder = load_embedder(directory)
    forward = embedder.module.forward

    def shifted(input_ids: Tensor, attention_mask: Tensor | None = None) -> object:
        if attention_mask is not None:
            attention_mask = torch.cat(
                [attention_mask[:, :1], attention_mask[:, :-1]], dim=1
            )  # one token of padding is attended to
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(embedder.module, "forward", shifted)
    assert failed(directory, embedder) == {"padded"}


def test_pooling_that_counts_padding_is_caught(directory: Path, monkeypatch: pytest.MonkeyPatch):
    embedder = load_embedder(directory)
    monkeypatch.setitem(pooling.POOLINGS, "mean", lambda states, *_: states.mean(1))
    assert failed(directory, embedder) == {"padded"}


def test_the_wrong_pooling_is_caught(directory: Path, monkeypatch: pytest.MonkeyPatch):
    embedder = load_embedder(directory)
    monkeypatch.setattr(embedder.head, "modes", ("max",))
    proof = prove_embedder(directory, embedder)
    assert (proof.verdict, proof.batching) == ("different", "alone")


def test_swapped_layers_are_caught(directory: Path):
    embedder = load_embedder(directory)
    layers = embedder.module.get_submodule("encoder.layer")
    layers[0], layers[1] = layers[1], layers[0]  # type: ignore[index]
    assert prove_embedder(directory, embedder).verdict == "different"


def test_rows_that_leak_into_each_other_are_caught(
    directory: Path, monkeypatch: pytest.MonkeyPatch
):
    embedder = load_embedder(directory)
    embed = embedder.embed
    monkeypatch.setattr(embedder, "embed", lambda texts: embed(texts) + 1e-3 * (len(texts) - 1))
    proof = prove_embedder(directory, embedder)
    assert (proof.verdict, proof.batching) == ("equal", "alone")
    assert "one at a time" in proof.notes[0]


def test_a_length_that_the_model_lacks_is_refused(tmp_path: Path):
    directory = save_embedder(tmp_path)
    embedder = load_embedder(directory)
    embedder.info = msgspec.structs.replace(embedder.info, max_tokens=90)
    with pytest.raises(ImportFailure, match="90 tokens"):
        prove_embedder(directory, embedder)


def test_without_memory_nothing_is_claimed(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("runtime.proving.embedder.available_bytes", lambda: 1000)
    proof = prove_embedder(directory, load_embedder(directory))
    assert (proof.verdict, proof.batching, proof.checks) == ("unproved", "alone", [])


def test_runs_are_measured_by_batch(directory: Path):
    (report,) = measure_embedder(load_embedder(directory))
    assert report.is_chosen
    assert list(report.p50_ms) == [1, 8, 32]
    assert min(report.p50_ms.values()) > 0
    assert report.device_ms_max >= max(report.p50_ms.values())
