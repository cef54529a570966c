"""Which inputs look like images, and which values pixels get."""

import pytest

from runtime.importing.image_inputs import guess_image, with_image
from runtime.protocol import ImageInput, Schema, TensorSpec


def spec(shape: list[int | None], dtype: str = "float32", **values: float) -> TensorSpec:
    return TensorSpec(name="x", dtype=dtype, shape=shape, **values)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ([None, 1, 8, 8], (8, 8, 1, True)),
        ([None, 3, 224, 192], (224, 192, 3, True)),
        ([1, 3, 32, 32], (32, 32, 3, True)),
        ([None, 48, 64, 3], (48, 64, 3, False)),
        ([None, 28, 28, 1], (28, 28, 1, False)),
        ([None, 3, None, 224], None),
        ([2, 3, 32, 32], None),
        ([None, 4, 32, 32], None),
        ([None, 3, 7, 8], None),
        ([None, 3, 8, 5000], None),
        ([None, 64], None),
        ([3, 224, 224], None),
    ],
)
def test_what_looks_like_an_image(
    shape: list[int | None], size: tuple[int, int, int, bool] | None
) -> None:
    image = guess_image(spec(shape))
    found = image and (image.height, image.width, image.channels, image.is_channels_first)
    assert found == size


def test_token_ids_are_no_image() -> None:
    assert guess_image(spec([None, 3, 8, 8], "int64")) is None


def value(spec: TensorSpec, byte: int) -> float:
    """What a byte becomes."""
    image = guess_image(spec)
    assert image is not None
    scaled = byte * image.scale - (image.mean[0] if image.mean else 0)
    return scaled / (image.std[0] if image.std else 1)


@pytest.mark.parametrize(
    ("least", "most", "black", "white"),
    [
        (None, None, 0, 1),
        (0, 1, 0, 1),
        (0.01, 0.98, 0, 1),
        (0, 255, 0, 255),
        (3, 250, 0, 255),
        (0, 16, 0, 16),
        (-1, 1, -1, 1),
        (-2.1, 2.6, 0, 1),
        (0, 0, 0, 1),
    ],
)
def test_bytes_take_the_range_that_is_known(
    least: float | None, most: float | None, black: float, white: float
) -> None:
    values = {} if least is None or most is None else {"minimum": least, "maximum": most}
    known = spec([None, 1, 8, 8], **values)
    assert (value(known, 0), value(known, 255)) == pytest.approx((black, white))


def test_a_schema_keeps_what_it_says_of_images() -> None:
    said = ImageInput(height=8, width=8, channels=1, is_channels_first=True, scale=1.0)
    output = TensorSpec(name="y", dtype="float32", shape=[None, 10])
    image = TensorSpec(name="x", dtype="float32", shape=[None, 1, 8, 8], image=said)
    schema = Schema(inputs=[image], outputs=[output], is_batched=True)
    assert with_image(schema) == schema
    plain = Schema(inputs=[spec([None, 1, 8, 8])], outputs=[output], is_batched=True)
    assert with_image(plain).inputs[0].image is not None
    several = Schema(inputs=[*plain.inputs, output], outputs=[output], is_batched=True)
    assert with_image(several) == several
