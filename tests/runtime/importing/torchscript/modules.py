"""Small TorchScript files for the tests of importing and building them."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


def save_scripted(path: Path, module: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), path)
    return path


def save_traced(path: Path, module: nn.Module, *args: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, args, strict=False), path)
    return path


class Tokens(nn.Module):
    """Token ids to logits, by way of a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids).mean(1))


class Pair(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0] - 2 * pair[1]


class Many(nn.Module):
    def forward(self, many: list[torch.Tensor]) -> torch.Tensor:
        return many[0] - 2 * many[1]


class Named(nn.Module):
    def forward(self, named: dict[str, torch.Tensor]) -> torch.Tensor:
        return named["left"] - 2 * named["right"]


class Masked(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            x = x * mask
        return x + 1


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, factor: int = 3) -> torch.Tensor:
        return x * factor


class Counted(nn.Module):
    """A number that no request can hold."""

    def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x * count


class Nested(nn.Module):
    def forward(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[torch.Tensor]]:
        return x + 1, {"twice": x * 2}, [x, x.double()]


class Scores(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


class NamedScores(nn.Module):
    def forward(self, x: torch.Tensor) -> Scores:
        return Scores(x + 1, x * 2)


class WithSize(nn.Module):
    """Answers a number beside its tensor."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x, x.size(0)


class Looped(nn.Module):
    """What torch's converter cannot do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(x.size(1)):
            x = x + x[:, index : index + 1]
        return x


class Baked(nn.Module):
    """Whose trace has the example's batch in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(int(x.shape[0]), -1) * 2


class Widened(nn.Module):
    """Flattens two axes, and pads one."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.flatten(1), torch.nn.functional.pad(x, (1, 2))


class Counting(nn.Module):
    """Keeps a count between its runs, as an attribute or in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        return x + self.count


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count
