"""A tensor program is timed when it is built, at every size that bounds what a request costs."""

import torch

from runtime.proving.tensor_speed import batch_sizes, measure_tensor


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
