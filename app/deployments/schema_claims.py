"""Whether the description of a tensor program's inputs and outputs can be one: its axes, ranges,
padding, images, texts and labels agree with each other."""

import math

from runtime.protocol import ImageInput, Schema, TensorSpec, TextInput

MAX_TENSORS = 256
MAX_DIMENSIONS = 32
MAX_NAME_CHARS = 1_000
MAX_SIDE = 16_384  # pixels
MAX_LENGTH = 2**31  # of a row that may be padded
MAX_LABELS = 100_000
MAX_TEXT_TOKENS = 1_000_000


class NotAcceptable(Exception):
    """The result contradicts itself or cannot be kept. The message says what is wrong."""


def check_schema(schema: Schema) -> None:
    """Raises `NotAcceptable`."""
    for specs in (schema.inputs, schema.outputs):
        names = {spec.name for spec in specs}
        if not specs or len(specs) > MAX_TENSORS or len(names) != len(specs):
            raise NotAcceptable("its schema lists no tensors, too many, or one twice")
        if not all(0 < len(name) <= MAX_NAME_CHARS for name in names):
            raise NotAcceptable("a tensor of its schema has no name, or one that is too long")
        for spec in specs:
            _check_shape(spec)
            _check_range(spec)
            _check_padding(spec, schema.is_batched)
            if spec.image is not None:
                _check_image(spec, spec.image)
    if any(spec.image is not None for spec in schema.outputs):
        raise NotAcceptable("one of its outputs takes images")


def check_text(text: TextInput | None, schema: Schema) -> None:
    """Raises `NotAcceptable`."""
    if text is None:
        return
    names = {spec.name for spec in schema.inputs}
    optional = {name for name in (text.attention_mask, text.token_type_ids) if name}
    if text.token_ids not in names or not optional <= names:
        raise NotAcceptable("its texts become inputs that it does not have")
    if not 1 <= text.max_tokens <= MAX_TEXT_TOKENS:
        raise NotAcceptable("its texts have an implausible length")


def check_labels(labels: list[str]) -> None:
    """Raises `NotAcceptable`."""
    if len(labels) > MAX_LABELS:
        raise NotAcceptable("it names too many labels")


def _check_shape(spec: TensorSpec) -> None:
    shapes = [spec.shape, spec.min_shape or spec.shape, spec.max_shape or spec.shape]
    if len(spec.shape) > MAX_DIMENSIONS or len({len(shape) for shape in shapes}) != 1:
        raise NotAcceptable(f"the shapes of {spec.name!r} do not agree")
    if any(size is not None and size < 0 for shape in shapes for size in shape):
        raise NotAcceptable(f"{spec.name!r} has a negative size")


def _check_range(spec: TensorSpec) -> None:
    least = -math.inf if spec.minimum is None else spec.minimum
    greatest = math.inf if spec.maximum is None else spec.maximum
    if least > greatest:
        raise NotAcceptable(f"{spec.name!r} has a range without values")


def _check_padding(spec: TensorSpec, is_batched: bool) -> None:
    """Rows are padded along an axis of theirs that may have any length."""
    axis = spec.padded_axis
    longest = spec.longest_padded
    if longest is not None and (axis is None or not 1 <= longest <= MAX_LENGTH):
        raise NotAcceptable(f"{spec.name!r} is padded to an implausible length")
    if axis is None:
        return
    if not is_batched or not 1 <= axis < len(spec.shape) or spec.shape[axis] is not None:
        raise NotAcceptable(f"{spec.name!r} is padded along an axis that cannot be")


def _check_image(spec: TensorSpec, image: ImageInput) -> None:
    is_plausible = (
        1 <= image.height <= MAX_SIDE
        and 1 <= image.width <= MAX_SIDE
        and image.channels in (1, 3)
        and 0 <= image.shortest_edge <= MAX_SIDE
        and len(image.mean) in (0, image.channels)
        and len(image.std) in (0, image.channels)
        and all(value > 0 for value in image.std)
    )
    if not is_plausible:
        raise NotAcceptable(f"{spec.name!r} takes images of a kind that there is not")
    sides = [image.height, image.width]
    order = [image.channels, *sides] if image.is_channels_first else [*sides, image.channels]
    shapes = [order, sides] if image.channels == 1 else [order]
    if not any(_fits(spec.shape, shape) for shape in shapes):
        raise NotAcceptable(f"the images of {spec.name!r} do not fit its shape")


def _fits(shape: list[int | None], row: list[int]) -> bool:
    """Whether one row of `shape`, behind its axis 0, may have the sizes `row`."""
    sizes = shape[1:]
    return len(sizes) == len(row) and all(
        size in (None, wanted) for size, wanted in zip(sizes, row, strict=True)
    )
