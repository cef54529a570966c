"""Models with heads, built: what becomes of each kind, and that its answers are transformers'."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from runtime.building.kinds import build_program
from runtime.building.reporter import Reporter
from runtime.compiling.heads_export import export_head
from runtime.importing.archive import UnpackedUpload
from runtime.importing.exported import ExportedProgramModel, load_exported
from runtime.importing.heads import load_head
from runtime.importing.heads_layout import read_head
from runtime.importing.program import ImportFailure
from runtime.importing.signature import read_signature
from runtime.protocol import BuildHints, Manifest
from runtime.proving import heads as proving
from tests.runtime.embedders import SIZES, write_json
from tests.runtime.heads import (
    AUDIO_MODELS,
    IMAGE_MODELS,
    LABELS,
    TEXT_MODELS,
    WAVEFORM,
    cross_encoder,
    labelled,
    make,
    save_head,
    save_processor,
)

NAMES = list(LABELS.values())
# Families that are like others here.
TAIL = ("roberta", "distilbert", "modernbert", "convnext", "wavlm")
UNTYPED = {"roberta", "distilbert", "modernbert", "deberta-v2", "llama"}


def families(models: Iterable[str]) -> list[Any]:
    """The long tail is marked slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in TAIL)) for name in models]


@pytest.fixture(autouse=True)
def _only_in_soaks(request: pytest.FixtureRequest) -> None:
    is_slow = request.node.get_closest_marker("slow") is not None
    if is_slow and "slow" not in request.config.option.markexpr:
        pytest.skip("the long tail of families runs with -m slow (make soak)")


class Log:
    """Stands in for a `Reporter`."""

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[float, str], None]]:
        yield lambda *_: None


@dataclass
class Built:
    manifest: Manifest
    notes: list[str]
    checks: dict[str, bool]
    left: list[str]
    directory: Path

    @property
    def program(self) -> ExportedProgramModel:
        return load_exported(self.directory / "program.pt2")

    def run(self, **inputs: torch.Tensor) -> list[torch.Tensor]:
        assert self.manifest.schema is not None
        return self.program.run([inputs[spec.name] for spec in self.manifest.schema.inputs])


def build(directory: Path, tmp_path: Path) -> Built:
    scratch, artifact = tmp_path / "scratch", tmp_path / "artifact"
    scratch.mkdir()
    artifact.mkdir()
    upload = UnpackedUpload(kind="huggingface", path=directory)
    outcome = build_program(upload, scratch, cast(Reporter, Log()), BuildHints())
    assert outcome.verdict == "equal"
    left = outcome.package(artifact)
    checks = {check.name: check.is_equal for check in outcome.checks}
    return Built(outcome.manifest, outcome.notes, checks, left, artifact)


def refusal(directory: Path, tmp_path: Path) -> tuple[str | None, str]:
    with pytest.raises(ImportFailure) as caught:
        build(directory, tmp_path)
    return caught.value.error.code, caught.value.error.message


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


# --- texts ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families(TEXT_MODELS))
def test_heads_over_texts(family: str, tmp_path: Path) -> None:
    module = TEXT_MODELS[family]()
    directory = save_head(tmp_path / "model", module, has_types=family not in UNTYPED)
    built = build(directory, tmp_path)
    manifest = built.manifest
    assert (manifest.kind, manifest.format) == ("tensor", "pt2")
    schema, text = manifest.schema, manifest.text
    assert schema is not None
    assert text is not None
    assert schema.is_batched
    assert (text.max_tokens, text.takes_pairs) == (64, True)
    by_name = {spec.name: spec for spec in schema.inputs}
    assert (by_name["input_ids"].minimum, by_name["input_ids"].maximum) == (0, 199)
    assert by_name["input_ids"].pad_value == 1
    assert by_name["input_ids"].shape == [None, None]
    assert by_name["input_ids"].max_shape == [None, 64]
    # A Fourier transform mixes tokens without a mask; everything else may be padded.
    pads = None if family == "fnet" else 1
    assert {spec.padded_axis for spec in schema.inputs} == {pads}
    assert {spec.longest_padded for spec in schema.inputs} == {pads and 64}
    expected_labels = [] if family == "answers" else NAMES
    assert manifest.labels == expected_labels
    assert built.left == []
    assert (built.directory / "tokenizer.json").is_file()
    assert not (built.directory / "model.safetensors").exists()

    token_ids = torch.tensor([[2, 7, 9, 11, 3, 5], [2, 8, 10, 12, 6, 3]])
    options = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    options["token_type_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1]]).repeat(2, 1)
    taken = {name: value for name, value in options.items() if name in by_name}
    with torch.inference_mode():
        output: Any = module(**taken)
    found = built.run(**taken)
    for tensor, spec in zip(found, schema.outputs, strict=True):
        close(tensor, output[spec.name])


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    module = TEXT_MODELS["bert"]().to(torch.bfloat16)
    built = build(save_head(tmp_path / "model", module), tmp_path)
    assert {tensor.dtype for tensor in built.program.state.values()} >= {torch.bfloat16}
    assert built.manifest.schema is not None
    assert built.manifest.schema.outputs[0].dtype == "float32"


def test_a_cross_encoder_gives_one_raw_score(tmp_path: Path) -> None:
    directory = save_head(tmp_path / "model", cross_encoder())
    # As sentence-transformers lists it: one module, that is the model.
    write_json(directory / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "T"}])
    write_json(directory / "sentence_bert_config.json", {"do_lower_case": True})
    built = build(directory, tmp_path)
    assert built.manifest.labels == []
    assert built.manifest.schema is not None
    assert built.manifest.schema.outputs[0].shape == [None, 1]
    assert any("raw score" in note for note in built.notes)
    assert any("lower case" in note for note in built.notes)
    assert built.left == []


def test_several_labels_may_hold_where_the_configuration_says_so(tmp_path: Path) -> None:
    module = TEXT_MODELS["distilbert"]()
    module.config.problem_type = "multi_label_classification"
    built = build(save_head(tmp_path / "model", module, has_types=False), tmp_path)
    assert built.manifest.are_labels_independent
    assert not Manifest("tensor", "pt2", 1, 1).are_labels_independent


def test_without_a_tokenizer_token_ids_are_taken(tmp_path: Path) -> None:
    module = TEXT_MODELS["distilbert"]()
    built = build(save_head(tmp_path / "model", module, has_tokenizer=False), tmp_path)
    assert built.manifest.text is None
    assert any("takes token ids, not texts" in note for note in built.notes)


def test_long_rows_share_runs_with_few_others(tmp_path: Path) -> None:
    sizes = labelled(SIZES | {"max_position_embeddings": 20_000}, num_key_value_heads=2)
    directory = save_head(
        tmp_path, make("LlamaForSequenceClassification", "LlamaConfig", sizes), has_tokenizer=False
    )
    layout = read_head(directory)
    assert layout is not None
    model = load_head(layout)
    assert (model.max_tokens, model.max_rows) == (8192, 4)
    assert any("Of rows of 20,000 tokens" in note for note in model.notes)
    (spec, _) = read_signature(export_head(model)).schema.inputs
    assert spec.max_shape == [4, 8192]


# --- images -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", families(IMAGE_MODELS))
def test_heads_over_images(family: str, tmp_path: Path) -> None:
    module = IMAGE_MODELS[family]()
    directory = save_head(tmp_path / "model", module)
    save_processor(directory)
    built = build(directory, tmp_path)
    schema = built.manifest.schema
    assert schema is not None
    (spec,) = schema.inputs
    assert (spec.name, spec.shape) == ("pixel_values", [None, 3, 32, 32])
    assert spec.image is not None
    assert (spec.image.mean, spec.image.std) == ([0.5, 0.4, 0.3], [0.5, 0.6, 0.7])
    assert built.checks["images"]
    assert built.manifest.labels == NAMES
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected = module(pixel_values=pixels).logits
    close(built.run(pixel_values=pixels)[0], expected)


def test_images_that_are_prepared_in_unknown_ways_are_not_taken(tmp_path: Path) -> None:
    directory = save_head(tmp_path / "model", IMAGE_MODELS["vit"]())
    # It scales the normalised picture once more, which no setting says.
    save_processor(directory, image_processor_type="EfficientNetImageProcessor")
    built = build(directory, tmp_path)
    assert built.manifest.schema is not None
    assert built.manifest.schema.inputs[0].image is None
    assert not built.checks["images"]
    assert any("takes tensors, not image files" in note for note in built.notes)


def test_a_configuration_of_huge_images_is_refused(tmp_path: Path) -> None:
    directory = save_head(tmp_path / "model", IMAGE_MODELS["resnet"]())
    save_processor(directory, size={"height": 4000, "width": 4000})
    code, message = refusal(directory, tmp_path)
    assert code == "config_mismatch"
    assert "48,000,000 numbers in each row of pixel_values" in message


# --- audio ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families(AUDIO_MODELS))
def test_heads_over_audio(family: str, tmp_path: Path) -> None:
    module = AUDIO_MODELS[family]()
    built = build(save_head(tmp_path / "model", module), tmp_path)
    schema = built.manifest.schema
    assert schema is not None
    (spec,) = schema.inputs
    # torch exports WavLM's attention for one row at a time only.
    assert schema.is_batched == (family != "wavlm")
    rows = 3 if schema.is_batched else 1
    values = torch.randn(rows, *((64, 32) if family == "ast" else (777,)))
    with torch.inference_mode():
        expected = module(input_values=values).logits
    close(built.run(input_values=values)[0], expected)
    assert spec.padded_axis is None
    assert built.manifest.labels == NAMES


def test_a_waveform_with_a_mask_may_be_padded(tmp_path: Path) -> None:
    sizes = labelled(WAVEFORM, feat_extract_norm="layer", do_stable_layer_norm=True)
    module = make("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", sizes)
    built = build(save_head(tmp_path / "model", module), tmp_path)
    schema = built.manifest.schema
    assert schema is not None
    assert [spec.name for spec in schema.inputs] == ["input_values", "attention_mask"]
    assert [spec.padded_axis for spec in schema.inputs] == [1, 1]


# --- refusals ---------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_head(tmp_path / "model", TEXT_MODELS["bert"]())


def test_a_head_whose_weights_are_missing_is_refused(bert: Path, tmp_path: Path) -> None:
    """transformers would make one up, at random, and only log it."""
    weights = load_file(bert / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(kept, bert / "model.safetensors", {"format": "pt"})
    code, message = refusal(bert, tmp_path)
    assert code == "incomplete_weights"
    assert "classifier.bias, classifier.weight" in message


def test_a_bare_encoder_that_claims_a_head_is_refused(tmp_path: Path) -> None:
    encoder: Any = TEXT_MODELS["bert"]().base_model
    directory = save_head(tmp_path / "model", encoder)
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    write_json(directory / "config.json", config)
    assert refusal(directory, tmp_path)[0] == "incomplete_weights"


def test_a_head_of_another_size_is_refused(bert: Path, tmp_path: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    config["id2label"] = {str(at): str(at) for at in range(7)}
    config["label2id"] = {str(at): at for at in range(7)}
    write_json(bert / "config.json", config)
    code, message = refusal(bert, tmp_path)
    assert code == "incomplete_weights"
    assert "classifier.bias, classifier.weight" in message


def test_a_model_that_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    sizes = {
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 200},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32},
        **{"decoder_ffn_dim": 32, "max_position_embeddings": 70, "pad_token_id": 1},
    }
    module = make("BartForSequenceClassification", "BartConfig", labelled(sizes, eos_token_id=3))
    code, message = refusal(save_head(tmp_path / "model", module), tmp_path)
    assert code == "export_failed"
    assert "BartForSequenceClassification cannot be exported as a graph" in message


def test_a_graph_that_computes_something_else_is_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = proving.load_head_module

    def load_another(*args: Any) -> transformers.PreTrainedModel:
        module = load(*args)
        with torch.no_grad():
            module.get_parameter("classifier.bias")[0] += 0.01
        return module

    monkeypatch.setattr(proving, "load_head_module", load_another)
    code, message = refusal(bert, tmp_path)
    assert code == "not_equal"
    assert "head, alone" in message


@pytest.mark.parametrize("name", ["BertForMultipleChoice", "BertForNextSentencePrediction"])
def test_other_heads_are_refused_by_name(name: str, bert: Path, tmp_path: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    config["architectures"] = [name]
    write_json(bert / "config.json", config)
    code, message = refusal(bert, tmp_path)
    assert code == "not_a_decoder"
    assert name in message
    assert "classify" in message
