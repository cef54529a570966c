"""The demo's tensor program: a small CNN on scikit-learn's handwritten digits.

Owns the data split, the training and the export. Everything is cached in one directory.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

REQUIRED_ACCURACY = 0.97
NUM_HELD_OUT = 360


class DigitsCnn(nn.Module):
    """Two convolutions and a linear layer over 8x8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classify = nn.Sequential(nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 10))

    def forward(self, image: Tensor) -> Tensor:  # [batch, 1, 8, 8] -> [batch, 10]
        return self.classify(self.features(image))


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then the held-out ones; always the same split."""
    pixels, targets = load_digits(return_X_y=True)  # [1797, 64] from 0 to 16, [1797]
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(targets)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    held_out, training = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
    return images[training], labels[training], images[held_out], labels[held_out]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()


def train() -> DigitsCnn:
    """Trains for some seconds. The seed is fixed, so that a rerun gives the same model."""
    torch.manual_seed(0)
    images, labels, _, _ = split()
    model = DigitsCnn()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(25):
        for batch in torch.randperm(len(labels)).split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def prepare(directory: Path) -> Path:
    """The exported `digits.pt2`, made once. Raises `RuntimeError` if the model is not good."""
    path = directory / "digits.pt2"
    if path.exists():
        return path
    model = train()
    _, _, images, labels = split()
    with torch.inference_mode():
        reached = accuracy(model(images), labels)
    if reached < REQUIRED_ACCURACY:
        raise RuntimeError(f"the digits model reached {reached:.1%}, under {REQUIRED_ACCURACY:.0%}")
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (images[:4],), dynamic_shapes={"image": {0: batch}})
    partial = path.with_suffix(".partial.pt2")
    torch.export.save(program, partial)
    partial.rename(path)
    return path


def local_logits(path: Path) -> Tensor:
    """What the exported model itself says about the held-out images, in this process."""
    _, _, images, _ = split()
    with torch.inference_mode():
        return torch.export.load(path).module()(images)
