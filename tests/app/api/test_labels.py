"""Logits to labels and scores."""

import numpy as np
import pytest

from app.api.labels import MAX_LABELS, labels_of
from runtime.protocol import Manifest, Predicted, Tensor

NAMES = ["bad", "middling", "good"]


def manifest(labels: list[str], *, independent: bool = False) -> Manifest:
    return Manifest(
        kind="tensor",
        format="pt2",
        num_parameters=1,
        weight_bytes=4,
        labels=labels,
        are_labels_independent=independent,
    )


def predicted(logits: object, name: str = "logits") -> Predicted:
    values = np.asarray(logits, np.float32)
    tensor = Tensor(name, "float32", list(values.shape), values.tobytes())
    return Predicted("r", [tensor], device_ns=1, batch_rows=1, queue_ns=0)


def test_scores_are_shares_of_all_labels() -> None:
    found = labels_of(predicted([[0.0, np.log(3.0), 0.0], [1000.0, 0.0, 0.0]]), manifest(NAMES))
    assert found is not None
    assert [each.label for each in found[0]] == ["middling", "bad", "good"]
    assert [each.score for each in found[0]] == pytest.approx([0.6, 0.2, 0.2])
    assert [each.score for each in found[1]] == pytest.approx([1.0, 0.0, 0.0])


def test_independent_labels_are_scored_each_by_itself() -> None:
    found = labels_of(predicted([[0.0, 1000.0, -1000.0]]), manifest(NAMES, independent=True))
    assert found is not None
    assert [(each.label, each.score) for each in found[0]] == [
        ("middling", 1.0),
        ("bad", 0.5),
        ("good", 0.0),
    ]


def test_the_best_of_many_labels_come_alone() -> None:
    names = [str(at) for at in range(1000)]
    found = labels_of(predicted([np.arange(1000)]), manifest(names))
    assert found is not None
    assert [each.label for each in found[0]] == ["999", "998", "997", "996", "995"]
    assert len(found[0]) == MAX_LABELS


def test_a_row_of_no_numbers_has_no_labels() -> None:
    found = labels_of(predicted([[np.nan, 1, 2], [1, 2, 3], [np.inf, 1, 1]]), manifest(NAMES))
    assert found is not None
    assert [len(row) for row in found] == [0, 3, 0]
    assert all(np.isfinite(each.score) for row in found for each in row)


@pytest.mark.parametrize(
    ("logits", "names"),
    [([[1.0, 2.0]], NAMES), ([[1.0]], []), ([[[1.0, 2.0, 3.0]]], NAMES), ([1.0, 2.0, 3.0], NAMES)],
)
def test_other_outputs_have_no_labels(logits: object, names: list[str]) -> None:
    assert labels_of(predicted(logits), manifest(names)) is None
