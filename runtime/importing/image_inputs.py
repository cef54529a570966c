"""Which input of a program takes images, told by its shape alone.

Owns the guess and the values that pixels then get. Decoding is `batching/images.py`'s.
"""

import msgspec

from runtime.protocol import ImageInput, Schema, TensorSpec

MIN_SIDE = 8  # pixels
MAX_SIDE = 4096
NUM_CHANNELS = (1, 3)
DTYPES = frozenset({"float32", "float16", "float64", "uint8"})
MOST_BYTE = 255
ABOUT_BYTES = 128  # a range of values that goes beyond this is that of bytes


def with_image(schema: Schema) -> Schema:
    """The schema with `image` set where its one input looks like images: [n, 1 or 3, height,
    width] or [n, height, width, 1 or 3] with fixed sides. An `image` that is there already
    stays."""
    if len(schema.inputs) != 1 or schema.inputs[0].image is not None:
        return schema
    (spec,) = schema.inputs
    image = guess_image(spec)
    if image is None:
        return schema
    return msgspec.structs.replace(schema, inputs=[msgspec.structs.replace(spec, image=image)])


def guess_image(spec: TensorSpec) -> ImageInput | None:
    """How images would fill the input; None where it does not look like images."""
    if spec.dtype not in DTYPES or len(spec.shape) != 4 or spec.shape[0] not in (None, 1):
        return None
    for channels_at, height_at, width_at in ((1, 2, 3), (3, 1, 2)):
        channels, height, width = (spec.shape[at] for at in (channels_at, height_at, width_at))
        if channels not in NUM_CHANNELS or height is None or width is None:
            continue
        if min(height, width) >= MIN_SIDE and max(height, width) <= MAX_SIDE:
            scale, mean, std = _values(spec)
            return ImageInput(
                height=height,
                width=width,
                channels=channels,
                is_channels_first=channels_at == 1,
                scale=scale,
                mean=mean,
                std=std,
            )
    return None


def _values(spec: TensorSpec) -> tuple[float, list[float], list[float]]:
    """Scale, mean and deviation that take bytes to the values which the input is known to take:
    0 to 1 where nothing is known, or where it is no range that pictures come in."""
    least, most = spec.minimum, spec.maximum
    if spec.dtype == "uint8":
        return 1.0, [], []
    if least is None or most is None or not most > 0:
        return 1 / MOST_BYTE, [], []
    if least == -most:
        half = 0.5 / most
        return 1 / MOST_BYTE, [0.5], [half]
    if least < 0 or most <= 1:
        return 1 / MOST_BYTE, [], []
    return (1.0 if most > ABOUT_BYTES else most / MOST_BYTE), [], []
