"""Small exported programs for the tests of importing, proof and build."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

BATCH = {0: Dim.DYNAMIC}


def export(path: Path, module: nn.Module, *args: Any, dynamic: Any = ..., **kwargs: Any) -> Path:
    """Export in evaluation mode to `path`; by default every argument has a dynamic batch."""
    if dynamic is ...:
        dynamic = dict.fromkeys(kwargs, BATCH) or tuple(BATCH for _ in args)
    program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic)
    torch.export.save(program, path)
    return path


def export_digits(path: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    return export(path, Digits().eval(), torch.rand(2, 1, 8, 8), **options)


class Digits(nn.Module):
    """The demo's kind of model: images of 8x8 to ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.features(image).flatten(1)))


class Classifier(nn.Module):
    """Token ids and an optional mask to a dict of outputs."""

    def __init__(self, vocab_size: int = 50) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8)
        self.head = nn.Linear(8, 3)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, scale: bool = True
    ) -> dict[str, torch.Tensor]:
        hidden = self.embedding(ids)
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        return {"logits": self.head(hidden.mean(1)), "hidden": hidden * 2 if scale else hidden}


class MinusBatchMean(nn.Module):
    """A planted fault: every row's answer depends on its neighbours, by `strength`."""

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.strength = strength

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y - self.strength * y.mean(0, keepdim=True)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Counting(nn.Module):
    """A planted fault: a run writes to a buffer, parameter or constant that the next one reads."""

    count: torch.Tensor

    def __init__(self, kind: str = "buffer") -> None:
        super().__init__()
        if kind == "buffer":
            self.register_buffer("count", torch.zeros(1))
        elif kind == "parameter":
            self.count = nn.Parameter(torch.zeros(1), requires_grad=False)
        else:
            self.count = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + 0 * self.count
