"""What a classifier's logits say in words: per row the best labels and their scores.

Owns the arithmetic from logits to scores. Does not own the answer that they are part of.
"""

from typing import Any

import msgspec
import numpy as np

from app.api.tensors import array_of
from runtime.protocol import Manifest, Predicted

MAX_LABELS = 5  # of one row

Array = np.ndarray[Any, np.dtype[Any]]


class Label(msgspec.Struct, frozen=True):
    """`score` is 0 to 1: a share of all labels, or where several may hold, of this one alone."""

    label: str
    score: float


def labels_of(predicted: Predicted, manifest: Manifest) -> list[list[Label]] | None:
    """Per row the best labels, best first; None where the model has none, or its first output is
    not one row of logits per row."""
    if not manifest.labels or not predicted.outputs:
        return None
    tensor = predicted.outputs[0]
    if len(tensor.shape) != 2 or tensor.shape[1] != len(manifest.labels):
        return None
    logits = np.asarray(array_of(tensor), dtype=np.float64)
    scores = _sigmoid(logits) if manifest.are_labels_independent else _softmax(logits)
    return [_best(row, manifest.labels) for row in scores]


def _best(scores: Array, names: list[str]) -> list[Label]:
    """NaN, of a row whose logits are no numbers, names nothing."""
    order: list[int] = np.argsort(-scores, kind="stable")[:MAX_LABELS].tolist()
    return [Label(names[at], float(scores[at])) for at in order if not np.isnan(scores[at])]


def _sigmoid(logits: Array) -> Array:
    # By tanh, which does not overflow.
    return 0.5 * (1.0 + np.tanh(0.5 * logits))


def _softmax(logits: Array) -> Array:
    with np.errstate(invalid="ignore"):  # an infinity less another is no number
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)
