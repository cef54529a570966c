"""How image files are prepared: as transformers' own processors do, or not at all."""

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageOps

from runtime.batching.images import image_row
from runtime.importing.heads_images import ImageSize, load_processor, read_image
from runtime.protocol import ImageInput, TensorSpec
from tests.runtime.embedders import write_json

SQUARE = {"height": 32, "width": 32}
FOLLOWED: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": SQUARE},
    "ViTImageProcessorFast": {"size": SQUARE, "do_normalize": False},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 32}, "resample": 3},
    "CLIPImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
    "MobileNetV2ImageProcessor": {"size": {"shortest_edge": 36}, "crop_size": SQUARE},
    "BitImageProcessor": {"size": {"shortest_edge": 36}, "crop_size": SQUARE, "resample": 3},
    "SiglipImageProcessor": {"size": SQUARE, "image_mean": [0.1, 0.2, 0.3]},
}


def read(directory: Path, kind: str, settings: dict[str, Any]) -> tuple[ImageInput | None, str]:
    content = {"image_processor_type": kind, **settings}
    write_json(directory / "preprocessor_config.json", content)
    return read_image(directory, 3)


@pytest.mark.parametrize("kind", FOLLOWED)
@pytest.mark.parametrize("size", [(97, 71), (40, 150)])
def test_what_transformers_does_is_done(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    image, note = read(tmp_path, kind, FOLLOWED[kind])
    assert image is not None, note
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    file = io.BytesIO()
    picture.save(file, "PNG")
    spec = TensorSpec(name="pixel_values", dtype="float32", shape=[None, 3, 32, 32], image=image)
    row = image_row(file.getvalue(), spec)
    expected = load_processor(tmp_path)(images=picture, return_tensors="np")["pixel_values"]
    found = np.frombuffer(row.data, np.float32).reshape(row.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def picture(mode: str) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 256, (71, 97, bands), dtype=np.uint8)
    if mode == "P":
        return Image.fromarray(noise[:, :, 0]).convert("P")
    return Image.fromarray(noise.squeeze(), mode if mode == "CMYK" else None)


@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [
        ("RGBA", "PNG", {}),
        ("RGBA", "WEBP", {}),
        ("LA", "PNG", {}),
        ("L", "PNG", {}),
        ("L", "PNG", {"transparency": 3}),
        ("P", "PNG", {"transparency": 3}),
        ("RGB", "JPEG", {}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6, 7])
@pytest.mark.parametrize("shortest_edge", [36, 21])
def test_every_kind_of_file_is_read_as_by_transformers(
    mode: str,
    format: str,
    options: dict[str, Any],
    orientation: int,
    shortest_edge: int,
    tmp_path: Path,
) -> None:
    """On a white page, upright, and with a black border where less is left than is cut out."""
    settings = {"size": {"shortest_edge": 36}, "crop_size": SQUARE}
    image, note = read(tmp_path, "CLIPImageProcessor", settings)
    assert image is not None, note
    image = msgspec.structs.replace(image, shortest_edge=shortest_edge)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture(mode).save(file, format, exif=exif, **options)
    spec = TensorSpec(name="pixel_values", dtype="float32", shape=[None, 3, 32, 32], image=image)
    row = image_row(file.getvalue(), spec)
    upright = ImageOps.exif_transpose(Image.open(file))
    expected = load_processor(tmp_path)(
        images=upright, size={"shortest_edge": shortest_edge}, return_tensors="np"
    )["pixel_values"]
    found = np.frombuffer(row.data, np.float32).reshape(row.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_an_old_file_of_a_residual_network_is_read_by_its_size(tmp_path: Path) -> None:
    write_json(
        tmp_path / "preprocessor_config.json",
        {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875},
    )
    image, _ = read_image(tmp_path, 3)
    assert image is not None
    assert (image.height, image.width, image.shortest_edge) == (224, 224, 256)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("DeiTImageProcessor", {"size": {"height": 36, "width": 36}, "crop_size": SQUARE}, "cuts"),
        ("MobileViTImageProcessor", {}, "do_flip_channel_order"),
        ("ViTImageProcessor", {"size": SQUARE, "do_resize": False}, "does not resize"),
        ("ViTImageProcessor", {"size": SQUARE, "image_mean": [0.5]}, "mean and deviation"),
        ("ViTImageProcessor", {"size": SQUARE, "image_std": [0, 1, 1]}, "mean and deviation"),
        ("ViTImageProcessor", {"size": {"height": 9999, "width": 9999}}, "too large"),
        ("ViTImageProcessor", {"size": SQUARE, "resample": 4}, "resample"),
        ("NoSuchImageProcessor", {"size": SQUARE}, "cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_left_out_with_the_reason(
    kind: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    image, note = read(tmp_path, kind, settings)
    assert image is None
    assert reason in note
    assert "takes tensors, not image files" in note


def test_without_a_processor_tensors_are_taken(tmp_path: Path) -> None:
    image, note = read_image(tmp_path, 3)
    assert image is None
    assert "no preprocessor_config.json" in note


@pytest.mark.parametrize(
    ("value", "size"),
    [(32, (32, 32)), ([16, 24], (16, 24)), (None, (224, 224)), ("x", (224, 224)), (-1, (224, 224))],
)
def test_a_models_own_size(value: Any, size: tuple[int, int]) -> None:
    assert ImageSize.named(value) == ImageSize(*size)
