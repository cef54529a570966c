"""A tensor program is timed when it is built, at every size that bounds what a request costs."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from runtime.importing.exported import load_exported
from runtime.proving import tensor_speed
from runtime.proving.inputs import find_inputs
from runtime.proving.tensor_speed import AXIS_SIZES, batch_sizes, measure_rows, measure_tensor
from tests.runtime.importing.programs import export, export_digits


def test_eager_is_measured_at_every_size_up_to_the_largest_run():
    sizes: list[int] = []
    lines: list[str] = []

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        sizes.append(inputs[0].shape[0])
        return inputs

    (report,) = measure_tensor(
        run, lambda rows: [torch.zeros(rows, 2)], 64, lambda _, line: lines.append(line)
    )
    assert (report.name, report.is_chosen, report.fate) == ("eager", True, "chosen")
    assert list(report.p50_ms) == list(report.rows_per_second) == [1, 8, 32, 64]
    assert report.device_ms_max >= max(report.p50_ms.values()) > 0
    assert set(sizes) == {1, 8, 32, 64}
    assert len(lines) == 4


def test_the_largest_run_is_always_measured():
    assert batch_sizes(1) == [1]
    assert batch_sizes(5) == [1, 5]
    assert batch_sizes(128) == [1, 8, 32, 128]


class Attending(nn.Module):
    """Every position looks at every other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def rows_of(path: Path, *, is_batched: bool, most: int = 5000) -> tuple[dict[int, float], list]:
    model = load_exported(path)
    shapes = []

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if max(inputs[0].shape) > most:
            raise RuntimeError("no position")
        shapes.append(list(inputs[0].shape))
        return model.run(inputs)

    schema = model.schema
    if not is_batched:
        schema = type(schema)(inputs=schema.inputs, outputs=schema.outputs, is_batched=False)
    return measure_rows(run, find_inputs(model)[0], schema), shapes


def test_a_row_is_measured_at_growing_sizes_of_its_axes(tmp_path: Path) -> None:
    path = export(
        tmp_path / "model.pt2",
        Attending(),
        torch.rand(2, 5, 4),
        dynamic=({0: Dim("rows", max=64), 1: Dim("length", max=300)},),
    )
    found, shapes = rows_of(path, is_batched=True)
    assert list(found) == [5, 16, 32, 64, 128, 256, 300]
    assert all(shape[0] == 1 for shape in shapes)
    assert all(ms > 0 for ms in found.values())
    found, shapes = rows_of(path, is_batched=True, most=100)
    assert list(found) == [5, 16, 32, 64], "what does not run ends the search"
    found, shapes = rows_of(path, is_batched=False)
    assert max(found) == 64 * 300, "where rows share no run, they grow too"
    assert [1, 300, 4] in shapes


def test_a_slow_row_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export(
        tmp_path / "model.pt2",
        Attending(),
        torch.rand(2, 8, 4),
        dynamic=({0: Dim("rows"), 1: Dim("length")},),
    )
    monkeypatch.setattr(tensor_speed, "_run_ms", lambda _, inputs: float(inputs[0].shape[1]))
    monkeypatch.setattr(tensor_speed, "SLOW_MS", 100.0)
    found, _ = rows_of(path, is_batched=True)
    assert found == {8: 8.0, 16: 16.0, 32: 32.0, 64: 64.0, 128: 128.0}
    monkeypatch.setattr(tensor_speed, "SLOW_MS", 1e9)
    found, _ = rows_of(path, is_batched=True)
    assert max(found) == AXIS_SIZES[-1]
    peaks = iter(range(0, 10**15, 10**12))
    monkeypatch.setattr(tensor_speed, "_peak_bytes", lambda: next(peaks))
    found, _ = rows_of(path, is_batched=True)
    assert list(found) == [8], "one that takes much memory is the last too"


def test_rows_of_one_size_need_no_more(tmp_path: Path) -> None:
    assert rows_of(export_digits(tmp_path / "model.pt2"), is_batched=True)[0] == {}
