"""An architecture that did not exist when this was written is paged without a change, and what
its masks are is found by evaluating them, whatever its configuration says."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from runtime.importing.huggingface import PAGE_ANOTHER_WAY, load_decoder
from runtime.importing.huggingface_uncached import load_uncached
from runtime.importing.program import ImportFailure
from runtime.proving.decoder import DecoderProof, DecoderProver
from runtime.proving.forms import Form, WholeForm, paged_form
from runtime.proving.huggingface_original import HuggingFaceOriginal
from tests.runtime.importing.newcomer import (
    HEADS,
    KEY_WIDTH,
    KV_HEADS,
    NewcomerConfig,
    NewcomerForCausalLM,
    Overlay,
    planted,
)

WINDOW = NewcomerConfig.window


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if a later transformers had the class."""
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "newcomer", NewcomerConfig)
    monkeypatch.setitem(
        MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, NewcomerConfig, NewcomerForCausalLM
    )
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "newcomer", "NewcomerForCausalLM")
    assert AutoConfig.for_model("newcomer").window == WINDOW
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(NewcomerConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> "Plant":
    return Plant(monkeypatch)


class Plant:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, kind: str, overlay: Overlay) -> None:
        self._monkeypatch.setitem(planted, kind, overlay)


def prove(directory: Path, form: Form) -> DecoderProof:
    return DecoderProver(HuggingFaceOriginal(directory), block_size=8).prove(form)


def behind(distance: int) -> Overlay:
    """Visible: keys less than `distance` tokens behind."""
    return lambda _batch, _head, query, key: key > query - distance


def prefix_looks_ahead(_batch: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
    return key < 4


def test_it_is_paged_with_all_it_does(directory: Path, plant: Plant) -> None:
    plant("and", behind(WINDOW))
    decoder = load_decoder(directory)
    # Each layer attends twice.
    assert [layer.attention.sliding_window for layer in decoder.layers] == [WINDOW] * 2 + [None] * 2
    for layer in decoder.layers:
        assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (HEADS, KV_HEADS, KEY_WIDTH)
        assert layer.attention.soft_cap == 3.0
        assert layer.attention.sinks is not None
    form = paged_form(decoder, lambda dtype: load_decoder(directory, dtype=dtype), block_size=8)
    proof = prove(directory, form)
    assert proof.verdict == "equal", proof.checks


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1])
def test_a_mask_that_differs_from_the_configuration_by_one_is_followed(
    directory: Path, plant: Plant, window: int
) -> None:
    plant("and", behind(window))
    decoder = load_decoder(directory)
    assert decoder.layers[0].attention.sliding_window == window
    form = paged_form(decoder, lambda dtype: load_decoder(directory, dtype=dtype), block_size=8)
    assert prove(directory, form).verdict == "equal"
    # What was read from one mask does not pass for a model with another.
    plant("and", behind(WINDOW))
    assert prove(directory, form).verdict == "different"


def test_a_prefix_that_looks_ahead_is_not_paged_but_served_whole(
    directory: Path, plant: Plant
) -> None:
    plant("or", prefix_looks_ahead)
    with pytest.raises(ImportFailure) as caught:
        load_decoder(directory)
    assert caught.value.error.code == "mask_unsupported"
    assert caught.value.error.code in PAGE_ANOTHER_WAY
    model = load_uncached(directory, unpaged_reason=caught.value.error.message)
    form = WholeForm(
        name="whole",
        dtype=model.dtype,
        max_context_tokens=128,
        load=lambda dtype: load_uncached(directory, dtype=dtype),
    )
    assert prove(directory, form).verdict == "equal"
