"""Compares what a worker makes of texts and images with what transformers makes of them.

Owns the samples. What follows from a difference is the build's to say.
"""

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.batching.images import image_row
from runtime.batching.tensors import PredictFailure
from runtime.batching.text_rows import TextRows
from runtime.importing.heads_images import load_processor
from runtime.importing.heads_text import HeadText
from runtime.importing.huggingface_loading import first_line
from runtime.protocol import Check, TensorSpec

SAMPLES = [
    "A short text.",
    "Two   spaces, TWO cases; numbers 1,234.5 and (brackets)!",
    "Ünïcödé — «quotes», 中文字符, emoji \U0001f680 and a\ttab\nand a line",
    "[MASK] <s> </s> [SEP] words that look special",
    "x",
]
IMAGE_SIZES = [(97, 71), (64, 150), (300, 300)]  # width, height
IMAGE_TOLERANCE = 1e-4  # of a prepared value; a rounded byte more or less is 40 times that


def check_texts(text: HeadText, rows: TextRows) -> Check:
    """The same rows, of one text and of two, with padding where lengths differ."""
    singles = [[sample] for sample in SAMPLES]
    pairs = list(map(list, pairwise(SAMPLES)))
    transformers: Any = text.tokenizer
    num_compared = 0
    for row in [*singles, *(pairs if text.text.takes_pairs else [])]:
        expected = transformers(*row)
        try:
            found = rows([row])
        except PredictFailure as error:
            if error.error.code == "context_length_exceeded":
                continue  # of a model that takes a few tokens only
            return _texts(is_equal=False, detail=f"{row!r} is refused: {error}")
        for tensor in found:
            ids = np.frombuffer(tensor.data, np.int64).tolist()
            if ids != expected[tensor.name]:
                return _texts(is_equal=False, detail=f"{tensor.name} of {row!r} differ")
        num_compared += 1
    return _texts(is_equal=True, detail=f"{num_compared} rows as transformers tokenises them")


def _texts(*, is_equal: bool, detail: str) -> Check:
    return Check(name="texts", is_equal=is_equal, detail=detail)


def check_image(directory: Path, spec: TensorSpec) -> Check:
    """The same numbers for pictures of several proportions."""
    assert spec.image is not None, "the input takes images"
    processor = load_processor(directory)
    worst = 0.0
    detail = "largest difference of a prepared image's number from transformers' processor"
    try:
        for size in IMAGE_SIZES:
            picture = _picture(size)
            file = io.BytesIO()
            picture.save(file, "PNG")
            expected = np.asarray(processor(images=picture, return_tensors="np")["pixel_values"][0])
            row = image_row(file.getvalue(), spec)
            found = np.frombuffer(row.data, np.dtype(row.dtype)).reshape(row.shape)[0]
            if found.shape != expected.shape:
                shapes = f"{list(found.shape)}, not {list(expected.shape)}"
                return Check(name="images", is_equal=False, detail=f"prepared to {shapes}")
            worst = max(worst, float(np.abs(found - expected).max()))
    except Exception as error:  # noqa: BLE001 - it runs on settings that its owner wrote
        detail = f"the processor fails ({first_line(error)})"
        return Check(name="images", is_equal=False, detail=detail)
    return Check(
        name="images",
        is_equal=worst <= IMAGE_TOLERANCE,
        detail=detail,
        error=worst,
        tolerance=IMAGE_TOLERANCE,
    )


def _picture(size: tuple[int, int]) -> Image.Image:
    """Smooth colours with some noise, in which every way to resize shows."""
    width, height = size
    generator = np.random.default_rng(0)
    across = np.linspace(0, 255, width)[None, :, None] * np.array([1.0, 0.5, 0.0])
    down = np.linspace(0, 255, height)[:, None, None] * np.array([0.0, 0.5, 1.0])
    noise = generator.uniform(-40, 40, (height, width, 3))
    return Image.fromarray((across + down + noise).clip(0, 255).astype(np.uint8))
