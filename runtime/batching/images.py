"""Encoded images to rows of an input: decoding, and what the input's `ImageInput` asks for.

PNG, JPEG and WebP, told by content, with bounds that are checked before a pixel is decoded.
Transparent pixels become white, as on a page; rotation by EXIF is applied; colour profiles are
not. Blocks: its caller keeps it off the event loop.
"""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from runtime.batching.tensors import PredictFailure
from runtime.protocol import ImageInput, Tensor, TensorSpec

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 40_000_000  # 160 MB decoded, with an alpha channel
MAX_SIDE = 32_768
# Pillow's own bound only warns at first; `_open` looks at the size before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

Array = np.ndarray[Any, np.dtype[Any]]
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def image_row(data: bytes, spec: TensorSpec) -> Tensor:
    """One row of `spec`, which takes images, from the bytes of a file. Raises `PredictFailure`."""
    assert spec.image is not None, "the input takes images"
    array = _values(_fitted(_decoded(data, spec.image.channels), spec.image), spec)
    shape = [1] * (len(spec.shape) - array.ndim) + list(array.shape)
    return Tensor(name=spec.name, dtype=spec.dtype, shape=shape, data=array.tobytes())


def _decoded(data: bytes, channels: int) -> Image.Image:
    """Upright, without transparency, grey or red-green-blue."""
    try:
        with _open(data) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                image = _of_bytes(image)
            elif image.has_transparency_data:
                image = _on_white(image.convert("RGBA"))
            return image.convert("L" if channels == 1 else "RGB")
    except PredictFailure:
        raise
    except Exception:  # noqa: BLE001 - decoders raise what they like about a stranger's bytes
        raise _unreadable("is damaged or cut short") from None


def _on_white(image: Image.Image) -> Image.Image:
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A"))
    return page


def _of_bytes(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by its upper byte, where Pillow's conversion cuts all above 255 to white.
    One value may stand for what is transparent."""
    deep = np.asarray(image)
    is_hidden = deep == image.info.get("transparency", -1)
    return Image.fromarray(np.where(is_hidden, 255, deep >> 8).astype(np.uint8))


def _open(data: bytes) -> Image.Image:
    """Reads the header alone."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # noqa: BLE001 - as above
        raise _unreadable("is no PNG, JPEG or WebP that can be read") from None
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise PredictFailure(
            "image_too_large",
            f"The image has {width} x {height} pixels; {MAX_PIXELS:,} in all and {MAX_SIDE:,} a "
            "side are the most. Make it smaller.",
            param="image",
        )
    return image


def _fitted(image: Image.Image, wanted: ImageInput) -> Image.Image:
    """Of the wanted size, antialiased: all of it stretched, or the middle cut out."""
    size = (wanted.width, wanted.height)
    if wanted.shortest_edge:
        shorter = min(image.size)
        width, height = (wanted.shortest_edge * side // shorter for side in image.size)
        # Of a cut larger than what there is the rest is black, as transformers has it.
        left, top = (width - wanted.width) // 2, (height - wanted.height) // 2
        if max(width, height) > MAX_SIDE:
            raise _unreadable("is too long and narrow for this model")
        resized = image.resize((width, height), _FILTERS[wanted.resample])
        return resized.crop((left, top, left + wanted.width, top + wanted.height))
    return image if image.size == size else image.resize(size, _FILTERS[wanted.resample])


def _values(image: Image.Image, spec: TensorSpec) -> Array:
    """[channels, height, width] or [height, width, channels], in the input's dtype; integers keep
    0 to 255."""
    wanted = spec.image
    assert wanted is not None, "the input takes images"
    pixels = np.asarray(image).reshape(wanted.height, wanted.width, wanted.channels)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        pixels = pixels.astype(np.float32) * np.float32(wanted.scale)
        if wanted.mean:
            pixels = pixels - np.array(wanted.mean, np.float32)
        if wanted.std:
            pixels = pixels / np.array(wanted.std, np.float32)
    if wanted.is_channels_first:
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels, dtype)


def _unreadable(problem: str) -> PredictFailure:
    return PredictFailure("unreadable_image", f"The image {problem}.", param="image")
