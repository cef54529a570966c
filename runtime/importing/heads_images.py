"""Reads how a vision model's images were prepared, as transformers does.

Owns which settings can be followed. Decoding and resizing are `batching/images.py`'s.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from transformers import AutoImageProcessor

from runtime.importing.huggingface_loading import first_line
from runtime.protocol import ImageInput

PROCESSOR_NAME = "preprocessor_config.json"
DEFAULT_SIDE = 224
LARGEST_SIDE = 4096
# Of processors that resize a little larger and cut the middle out, as trained on ImageNet.
CROP_BELOW = 384
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_RESAMPLES: dict[Any, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class ImageSize:
    """In pixels."""

    height: int
    width: int

    @staticmethod
    def of(image: ImageInput | None) -> "ImageSize | None":
        return None if image is None else ImageSize(image.height, image.width)

    @staticmethod
    def named(value: Any) -> "ImageSize":
        """A configuration's `image_size`: a side, or both."""
        sides = [value, value] if isinstance(value, int) else value
        if isinstance(sides, list | tuple) and len(sides) == 2 and all(map(_is_side, sides)):
            return ImageSize(*sides)
        return ImageSize(DEFAULT_SIDE, DEFAULT_SIDE)


def read_image(directory: Path, channels: int) -> tuple[ImageInput | None, str]:
    """How image files become rows; or None and a note on why they cannot."""
    if not (directory / PROCESSOR_NAME).is_file():
        return None, (
            f"There is no {PROCESSOR_NAME}, so the endpoint takes tensors, not image files."
        )
    try:
        settings = load_processor(directory).to_dict()  # with its class's own defaults
        found = _image(settings, channels)
    except Exception as error:  # noqa: BLE001 - whatever a malformed configuration makes it raise
        found = f"cannot be followed ({first_line(error)})"
    if isinstance(found, ImageInput):
        return found, ""
    return None, f"The endpoint takes tensors, not image files: {PROCESSOR_NAME} {found}."


def load_processor(directory: Path) -> Any:
    """transformers' own, which needs Pillow alone. Raises whatever it raises."""
    return AutoImageProcessor.from_pretrained(
        directory, backend="pil", local_files_only=True, trust_remote_code=False
    )


def _image(settings: dict[str, Any], channels: int) -> ImageInput | str:
    """The input, or what the settings ask for that cannot be done."""
    if channels not in (1, 3):
        return f"is of a model with {channels} channels"
    for name in ("do_flip_channel_order", "rescale_offset", "do_pad", "do_thumbnail"):
        if settings.get(name):
            return f"asks for {name}"
    resized = _resized(settings)
    if isinstance(resized, str):
        return resized
    size, shortest_edge = resized
    if size.height > LARGEST_SIDE or size.width > LARGEST_SIDE:
        return "asks for images that are too large"
    resample = _RESAMPLES.get(settings.get("resample", 2))
    if resample is None:
        return f"asks for resample = {str(settings.get('resample'))[:40]}"
    mean, std = _normalisation(settings, channels)
    if mean is None or std is None:
        return "names no mean and deviation for each channel"
    scale = settings.get("rescale_factor", 1 / 255)
    if settings.get("do_rescale", True) is False:
        scale = 1.0
    if not isinstance(scale, int | float) or not 0 < scale <= 1:
        return "names no valid rescale_factor"
    return ImageInput(
        height=size.height,
        width=size.width,
        channels=channels,
        is_channels_first=True,
        scale=float(scale),
        mean=mean,
        std=std,
        resample=resample,
        shortest_edge=shortest_edge,
    )


def _resized(settings: dict[str, Any]) -> tuple[ImageSize, int] | str:
    """The size of the prepared image, and the shorter side before the middle is cut out (0: the
    image is stretched)."""
    if settings.get("do_resize") is False:
        return "does not resize"
    size, crop = settings.get("size"), settings.get("crop_size")
    crops = bool(settings.get("do_center_crop", crop is not None))
    size = size if isinstance(size, dict) else {"height": size, "width": size}
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        if not _is_side(edge):
            return "names no valid size"
        if "crop_pct" in settings:  # ConvNeXt's processor, which ResNets use too
            return _by_share(edge, settings["crop_pct"])
        return _cut_out(crop, edge) if crops else "keeps each image's proportions"
    height, width = size.get("height"), size.get("width")
    if not (_is_side(height) and _is_side(width)):
        return "names no valid size"
    if "crop_pct" in settings and height == width:
        return _by_share(height, settings["crop_pct"])
    if crops and _cut_out(crop, 0) != (ImageSize(height, width), 0):
        return "stretches images and then cuts the middle out"
    return ImageSize(height, width), 0


def _by_share(edge: int, share: Any) -> tuple[ImageSize, int] | str:
    if edge >= CROP_BELOW:
        return ImageSize(edge, edge), 0
    share = 224 / 256 if share is None else share
    if not isinstance(share, int | float) or not 0 < share <= 1:
        return "names no valid crop_pct"
    return ImageSize(edge, edge), int(edge / share)


def _cut_out(crop: Any, shortest_edge: int) -> tuple[ImageSize, int] | str:
    crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    height, width = crop.get("height"), crop.get("width")
    if not (_is_side(height) and _is_side(width)):
        return "names no valid crop_size"
    if shortest_edge and max(height, width) > shortest_edge:
        return "cuts out more than there is"
    return ImageSize(height, width), shortest_edge


def _normalisation(
    settings: dict[str, Any], channels: int
) -> tuple[list[float] | None, list[float] | None]:
    """Empty lists where images are not normalised; None where the settings are not valid."""
    if settings.get("do_normalize") is False:
        return [], []
    return _per_channel(settings.get("image_mean"), channels, least=None), _per_channel(
        settings.get("image_std"), channels, least=0.0
    )


def _per_channel(value: Any, channels: int, *, least: float | None) -> list[float] | None:
    values = [value] * channels if isinstance(value, int | float) else value
    if not isinstance(values, list | tuple) or len(values) != channels:
        return None
    if not all(isinstance(v, int | float) and (least is None or v > least) for v in values):
        return None
    return [float(v) for v in values]


def _is_side(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
