"""A small model to push."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from torch import nn

    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    ).eval()

    class Digits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.model(image)

    rows = torch.export.Dim("rows", min=1, max=64)
    example = torch.rand(2, 1, 8, 8)
    program = torch.export.export(Digits().eval(), (example,), dynamic_shapes={"image": {0: rows}})
    path = tmp_path_factory.mktemp("digits") / "digits.pt2"
    torch.export.save(program, path)
    return path
