"""Decoders that no cache fits, computed whole by transformers' own forward."""

from pathlib import Path

import pytest
import torch
from transformers.models.mamba.modeling_mamba import MambaForCausalLM

from runtime.importing.huggingface import load_original
from runtime.importing.huggingface_uncached import load_uncached
from runtime.importing.program import ImportFailure
from tests.runtime.decoders import save_decoder

MAMBA = {"state_size": 8, "max_position_embeddings": ...}
pytestmark = pytest.mark.filterwarnings("default")  # mamba tells that it runs in plain torch


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mamba")
    save_decoder("mamba", path, **MAMBA)
    return path


def test_info_says_that_and_why_nothing_is_cached(directory: Path) -> None:
    model = load_uncached(directory, unpaged_reason="It has no attention.")
    assert not model.info.is_paged
    assert model.info.unpaged_reason == "It has no attention."
    assert model.info.kv_bytes_per_token == 0
    assert (model.info.vocab_size, model.info.num_layers) == (96, 3)
    assert model.eos_token_ids == (2,)
    assert any("no context limit" in note for note in model.notes)


def test_rows_of_a_batch_are_what_each_is_alone(directory: Path) -> None:
    model = load_uncached(directory)
    rows = torch.randint(96, (4, 19), generator=torch.Generator().manual_seed(0))
    together = model.logits(rows)
    assert together.shape == (4, 96)
    assert together.dtype == torch.float32
    alone = torch.cat([model.logits(row[None]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        whole = load_original(directory)(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(together, whole[:, -1], rtol=1e-5, atol=1e-5)


def test_dtype_is_the_saved_one_unless_asked_for(tmp_path: Path) -> None:
    save_decoder("mamba", tmp_path, torch.bfloat16, **MAMBA)
    assert load_uncached(tmp_path).dtype == torch.bfloat16
    assert load_uncached(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_forward_that_does_not_run_here_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object, use_cache: bool = False, **__: object) -> None:
        raise ImportError("selective_scan needs a GPU")

    monkeypatch.setattr(MambaForCausalLM, "forward", forward)
    with pytest.raises(ImportFailure, match="selective_scan needs a GPU") as caught:
        load_uncached(directory)
    assert caught.value.error.code == "original_fails"


def test_what_is_refused_of_any_directory_is_refused_here(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "modeling.py").write_text("")
    with pytest.raises(ImportFailure, match="Python code"):
        load_uncached(tmp_path)
