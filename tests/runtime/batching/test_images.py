"""Images to rows: formats, orientation, transparency, sizes, values, and what is refused."""

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from runtime.batching.images import MAX_PIXELS, image_row
from runtime.batching.tensors import PredictFailure
from runtime.protocol import ImageInput, TensorSpec

COLOURS = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)  # [height, width, channels]


def spec(height: int, width: int, channels: int, dtype: str = "float32", **options: Any):
    is_first = options.pop("is_channels_first", True)
    image = ImageInput(
        height=height, width=width, channels=channels, is_channels_first=is_first, **options
    )
    sides: list[int | None] = [height, width]
    shape = [None, channels, *sides] if is_first else [None, *sides, channels]
    return TensorSpec(name="x", dtype=dtype, shape=shape, image=image)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def row(data: bytes, wanted: TensorSpec) -> np.ndarray[Any, Any]:
    tensor = image_row(data, wanted)
    assert (tensor.name, tensor.dtype) == ("x", wanted.dtype)
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)


def test_values_and_layouts() -> None:
    data = encoded(Image.fromarray(COLOURS))
    first = row(data, spec(8, 12, 3))
    assert first.shape == (1, 3, 8, 12)
    np.testing.assert_allclose(first[0], COLOURS.transpose(2, 0, 1) / 255, rtol=1e-6)
    last = row(data, spec(8, 12, 3, is_channels_first=False, mean=[0.5, 0, 1], std=[1, 2, 0.5]))
    wanted = (COLOURS / 255 - [0.5, 0, 1]) / [1, 2, 0.5]
    np.testing.assert_allclose(last[0], wanted, atol=1e-6)
    integers = row(data, spec(8, 12, 3, dtype="uint8"))
    assert (integers[0] == COLOURS.transpose(2, 0, 1)).all()
    assert row(data, spec(8, 12, 3, dtype="float16")).dtype == np.float16


def test_grey_becomes_colour_and_colour_grey() -> None:
    grey = Image.fromarray(COLOURS[:, :, 0])
    assert (row(encoded(grey), spec(8, 12, 3, dtype="uint8"))[0] == COLOURS[:, :, 0]).all()
    red = Image.new("RGB", (12, 8), "red")
    assert (row(encoded(red), spec(8, 12, 1, dtype="uint8")) == 76).all()  # ITU-R 601-2 luma
    bits = Image.new("1", (12, 8), 1)
    assert (row(encoded(bits), spec(8, 12, 1, dtype="uint8")) == 255).all()
    deep = Image.fromarray(np.full((8, 12), 0x80FF, np.uint16))
    assert (row(encoded(deep), spec(8, 12, 1, dtype="uint8")) == 0x80).all()


def test_what_is_transparent_becomes_white() -> None:
    half = Image.new("RGBA", (12, 8), (0, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 6, 8))
    pixels = row(encoded(half), spec(8, 12, 3, dtype="uint8", is_channels_first=False))[0]
    assert (pixels[:, :6] == [0, 0, 255]).all()
    assert (pixels[:, 6:] == 255).all()
    palette = Image.new("P", (12, 8), 0)
    data = encoded(palette, transparency=0)
    assert (row(data, spec(8, 12, 1, dtype="uint8")) == 255).all()


def test_a_transparent_value_of_deep_grey_is_white_and_the_rest_is_scaled() -> None:
    deep = np.full((8, 12), 0x4020, ">u2")
    deep[:, 6:] = 777
    lines = b"".join(b"\0" + line.tobytes() for line in deep)
    data = png(12, 8, zlib.compress(lines), bits=16, transparency=struct.pack(">H", 777))
    pixels = row(data, spec(8, 12, 1, dtype="uint8"))[0, 0]
    assert (pixels[:, :6] == 0x40).all()
    assert (pixels[:, 6:] == 255).all()


def test_jpeg_webp_and_the_camera_s_rotation() -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter, clockwise
    upright = row(encoded(image, "JPEG", exif=exif, quality=95), spec(40, 20, 1, dtype="uint8"))
    assert upright[0, 0, :18].min() > 240
    assert upright[0, 0, 22:].max() < 15
    lossless = encoded(image, "WEBP", lossless=True)
    assert (row(lossless, spec(20, 40, 1, dtype="uint8"))[0, 0, :, :20] == 255).all()
    cmyk = encoded(Image.new("CMYK", (12, 8), (0, 0, 0, 255)), "JPEG")
    assert row(cmyk, spec(8, 12, 3, dtype="uint8")).max() < 10


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_resizing_is_antialiased(resample: str) -> None:
    """As torch does it, to a rounding of the bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)
    data = encoded(Image.fromarray(noise))
    small = row(data, spec(16, 24, 1, resample=resample))
    wanted = interpolate(
        torch.from_numpy(noise).float()[None, None], (16, 24), mode=resample, antialias=True
    )
    np.testing.assert_allclose(small * 255, wanted.clamp(0, 255), atol=1.01)


def test_the_middle_is_cut_out() -> None:
    image = Image.new("L", (300, 100), 0)
    image.paste(255, (100, 0, 200, 100))
    pixels = row(encoded(image), spec(10, 10, 1, dtype="uint8", shortest_edge=10))
    assert pixels.min() > 200  # but for what filters mix at the cut
    stretched = row(encoded(image), spec(10, 30, 1, dtype="uint8"))
    assert (stretched[..., :8] == 0).all()


def png(width: int, height: int, body: bytes, *, bits: int = 8, transparency: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    hidden = chunk(b"tRNS", transparency) if transparency else b""
    parts = (chunk(b"IHDR", header), hidden, chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


WHOLE = encoded(Image.fromarray(COLOURS))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "unreadable_image"),
        (b"no image", "unreadable_image"),
        (SVG, "unreadable_image"),
        (encoded(Image.new("L", (8, 8)), "GIF"), "unreadable_image"),
        (encoded(Image.new("L", (8, 8)), "TIFF"), "unreadable_image"),
        (WHOLE[: len(WHOLE) // 2], "unreadable_image"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], "unreadable_image"),
        (png(8, 8, b"not deflated"), "unreadable_image"),
        (png(100_000, 1, b""), "image_too_large"),
        (png(30_000, 30_000, zlib.compress(bytes(1000))), "image_too_large"),
        (png(MAX_PIXELS // 8000 + 1, 8000, b""), "image_too_large"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(PredictFailure) as refused:
        image_row(data, spec(8, 12, 3))
    assert (refused.value.error.code, refused.value.error.param) == (code, "image")
    assert refused.value.error.status == 400


def test_damage_anywhere_never_escapes() -> None:
    """Whatever the decoders say of broken bytes, the caller gets a typed refusal or a row."""
    random = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP"):
        whole = bytearray(encoded(Image.fromarray(COLOURS), format))
        for _ in range(200):
            broken = bytearray(whole)
            for at in random.integers(0, len(broken), 3):
                broken[at] = random.integers(0, 256)
            with contextlib.suppress(PredictFailure):
                image_row(bytes(broken), spec(8, 12, 3))
