"""Reads which head a transformers directory says it has: a classifier's, or one that finds answers.

Loads no weights. How the model is called is `heads.py`'s.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.importing.embedder_layout import MODULES_NAME
from runtime.importing.huggingface_directory import read_json

Medium = Literal["text", "image", "audio"]


@dataclass(frozen=True)
class Task:
    """`auto` is the transformers class that loads such models, `mapping` its table of them.
    `is_labelled`: the last axis of the first output is the labels."""

    name: str  # in a sentence: "classifies texts"
    medium: Medium
    auto: str
    mapping: str
    is_labelled: bool = True


# Audio before text: its classifiers of raw waveforms are called ForSequenceClassification too.
TASKS = (
    Task(
        "classifies audio",
        "audio",
        "AutoModelForAudioClassification",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    ),
    Task(
        "classifies images",
        "image",
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    ),
    Task(
        "classifies texts",
        "text",
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    Task(
        "classifies tokens",
        "text",
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    ),
    Task(
        "finds answers in texts",
        "text",
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        is_labelled=False,
    ),
)


@dataclass(frozen=True)
class HeadLayout:
    """`labels` are those that mean something: a score alone has none, and nor do placeholders for
    it. `are_labels_independent`: any number of them may hold for one row."""

    directory: Path
    architecture: str
    task: Task
    labels: list[str]
    are_labels_independent: bool


def read_head(directory: Path) -> HeadLayout | None:
    """None where the directory holds no model with a head of `TASKS`. Raises `ImportFailure` for
    a configuration that cannot be read."""
    if not _is_alone(directory):
        return None
    config = read_json(directory / "config.json")
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        return None
    architecture, model_type = str(named[0]), str(config.get("model_type"))
    task = _task_of(architecture, model_type)
    if task is None:
        return None
    return HeadLayout(
        directory,
        architecture,
        task,
        _labels(config) if task.is_labelled else [],
        config.get("problem_type") == "multi_label_classification",
    )


def _is_alone(directory: Path) -> bool:
    """Whether nothing follows the model: sentence-transformers lists a cross-encoder as a single
    module, an embedder as several."""
    path = directory / MODULES_NAME
    if not path.is_file():
        return True
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False  # whoever reads the modules says so
    return isinstance(listed, list) and len(listed) == 1


def _task_of(architecture: str, model_type: str) -> Task | None:
    from transformers.models.auto import modeling_auto

    for task in TASKS:
        names = getattr(modeling_auto, task.mapping).get(model_type, ())
        if architecture in ([names] if isinstance(names, str) else names):
            return task
    return None


def _labels(config: dict[str, Any]) -> list[str]:
    """In the order of the outputs; empty for a single score, and where the names are not those
    of all outputs."""
    names = config.get("id2label")
    if not isinstance(names, dict) or len(names) < 2:
        return []
    if set(names) != {str(at) for at in range(len(names))}:
        return []
    return [str(names[str(at)]) for at in range(len(names))]
