"""Which directories hold a model with a head, and what its labels are."""

from pathlib import Path
from typing import Any

import pytest

from runtime.importing.heads_layout import read_head
from runtime.importing.program import ImportFailure
from tests.runtime.embedders import write_json


def config(directory: Path, model_type: str, architecture: str | None, **more: Any) -> Path:
    named = {} if architecture is None else {"architectures": [architecture]}
    write_json(directory / "config.json", {"model_type": model_type, **named, **more})
    return directory


@pytest.mark.parametrize(
    ("model_type", "architecture", "medium"),
    [
        ("bert", "BertForSequenceClassification", "text"),
        ("deberta-v2", "DebertaV2ForTokenClassification", "text"),
        ("roberta", "RobertaForQuestionAnswering", "text"),
        ("llama", "LlamaForSequenceClassification", "text"),
        ("vit", "ViTForImageClassification", "image"),
        ("deit", "DeiTForImageClassificationWithTeacher", "image"),
        ("resnet", "ResNetForImageClassification", "image"),
        ("wav2vec2", "Wav2Vec2ForSequenceClassification", "audio"),  # whatever it is called
        ("audio-spectrogram-transformer", "ASTForAudioClassification", "audio"),
    ],
)
def test_heads_are_told_by_architecture(
    model_type: str, architecture: str, medium: str, tmp_path: Path
) -> None:
    head = read_head(config(tmp_path, model_type, architecture))
    assert head is not None
    assert (head.architecture, head.task.medium) == (architecture, medium)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("bert", "BertModel"),
        ("bert", "BertForMaskedLM"),  # an encoder: it embeds
        ("bert", "BertForMultipleChoice"),
        ("bert", "ViTForImageClassification"),  # of another type
        ("llama", "LlamaForCausalLM"),
        ("no-such-type", "BertForSequenceClassification"),
        ("bert", None),
    ],
)
def test_others_have_none(model_type: str, architecture: str | None, tmp_path: Path) -> None:
    assert read_head(config(tmp_path, model_type, architecture)) is None


def test_a_classifier_under_a_pooling_is_an_embedders_encoder(tmp_path: Path) -> None:
    config(tmp_path, "bert", "BertForSequenceClassification")
    modules = [{"idx": at, "path": "", "type": "T"} for at in range(2)]
    write_json(tmp_path / "modules.json", modules[:1])
    assert read_head(tmp_path) is not None  # as sentence-transformers lists a ranker
    write_json(tmp_path / "modules.json", modules)
    assert read_head(tmp_path) is None


def labels(directory: Path, **more: Any) -> list[str]:
    head = read_head(config(directory, "bert", "BertForSequenceClassification", **more))
    assert head is not None
    return head.labels


def test_labels_are_in_the_order_of_the_outputs(tmp_path: Path) -> None:
    names = {"1": "b", "0": "a", "10": "k", **{str(at): str(at) for at in range(2, 10)}}
    found = labels(tmp_path, id2label=names)
    assert found == ["a", "b", *(str(at) for at in range(2, 10)), "k"]


@pytest.mark.parametrize(
    "names", [{"0": "LABEL_0"}, {"0": "a", "2": "c"}, {"a": "0", "b": "1"}, ["a", "b"], None]
)
def test_labels_that_name_no_outputs_are_left_out(names: Any, tmp_path: Path) -> None:
    assert labels(tmp_path, id2label=names) == []


def test_several_labels_may_hold(tmp_path: Path) -> None:
    config(
        tmp_path,
        "bert",
        "BertForSequenceClassification",
        problem_type="multi_label_classification",
    )
    head = read_head(tmp_path)
    assert head is not None
    assert head.are_labels_independent


def test_a_damaged_configuration_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ImportFailure, match="not valid JSON"):
        read_head(tmp_path)
