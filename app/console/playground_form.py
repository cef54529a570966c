"""The form that tries a tensor program out, made of its schema, and what is sent with it.

Owns the choice of a field for each input: lines of text, an image (drawn or a file), one number
each, or JSON. Running what was given is `playground.py`'s.
"""

import json
import math
from typing import Any, Literal

import msgspec
from litestar.datastructures import UploadFile

from app.api.predict_bodies import (
    Given,
    checked_image,
    checked_texts,
    decode_lists,
    takes_image,
)
from app.api.tensors import tensors_of_values
from app.api.threads import convert
from app.console.snippets import example_shape, example_value
from app.core.errors import InvalidRequest
from runtime.protocol import ImageInput, Manifest, Schema, Tensor, TensorSpec

Kind = Literal["texts", "image", "numbers", "json"]
MAX_NUMBER_FIELDS = 16
MAX_EXAMPLE_NUMBERS = 256  # a larger example would be no help to read
MAX_DRAWN_PIXELS = 64  # an image of more a side is not drawn by hand
PAIR = "|"  # between the two texts of a row
IMAGE = ":image"  # the file's field; an input may be called image itself


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One field of the form, and what it holds when the page is shown."""

    name: str
    kind: Kind
    hint: str
    value: str = ""
    values: list[str] = []  # of `numbers`
    image: ImageInput | None = None
    is_alternative: bool = False  # to an image above it

    @property
    def can_be_drawn(self) -> bool:
        """A small grey image, as a digit's is."""
        image = self.image
        return (
            image is not None
            and image.channels == 1
            and max(image.width, image.height) <= MAX_DRAWN_PIXELS
        )


def fields_of(manifest: Manifest, sent: dict[str, Any] | None = None) -> list[Field]:
    """With what was `sent` in them, or an example. A model that takes texts or images is asked
    for those; the fields of its inputs follow, for who would rather give numbers."""
    schema = manifest.schema
    assert schema is not None, "a tensor program has a schema"
    given = sent or {}
    if manifest.text is not None:
        return [_texts(manifest, given)]
    fields: list[Field] = []
    if takes_image(schema):
        spec = schema.inputs[0]
        assert spec.image is not None, "just asked"
        fields.append(Field(name=IMAGE, kind="image", hint=_image_hint(spec), image=spec.image))
    return fields + [_numbers(spec, given, is_alternative=bool(fields)) for spec in schema.inputs]


async def read_form(form: Any, manifest: Manifest) -> Given:
    """What a sent form asks. Raises `InvalidRequest`."""
    schema = manifest.schema
    assert schema is not None, "a tensor program has a schema"
    if manifest.text is not None:
        return _given_texts(str(form.get("texts", "")), manifest)
    image: Any = form.get(IMAGE)
    if isinstance(image, UploadFile) and (content := await image.read()):
        return Given(image=checked_image(content, schema))
    if takes_image(schema) and not str(form.get(schema.inputs[0].name, "")).strip():
        raise InvalidRequest("Draw or choose an image, or give its numbers.", param="image")
    num_chars = sum(len(value) for value in form.values() if isinstance(value, str))
    return Given(inputs=await convert(num_chars, lambda: _given_numbers(form, schema)))


# --- fields -----------------------------------------------------------------------------


def _texts(manifest: Manifest, given: dict[str, Any]) -> Field:
    assert manifest.text is not None, "asked by the caller"
    is_pair = manifest.text.takes_pairs
    example = "How tall is Mont Blanc? | It is 4,806 m high." if is_pair else "I liked it a lot."
    hint = f"One row a line{f', its two texts with {PAIR} between them' if is_pair else ''}."
    return Field(name="texts", kind="texts", hint=hint, value=str(given.get("texts", example)))


def _image_hint(spec: TensorSpec) -> str:
    image = spec.image
    assert image is not None, "asked by the caller"
    colours = "grey" if image.channels == 1 else "colour"
    return f"PNG, JPEG or WebP; made {image.width} x {image.height} pixels, {colours}."


def _numbers(spec: TensorSpec, given: dict[str, Any], *, is_alternative: bool) -> Field:
    shape = example_shape(spec)
    hint = f"{spec.dtype}, {_shape(spec)}{_range(spec)}"
    count = math.prod(shape)
    if not is_alternative and count <= MAX_NUMBER_FIELDS and count == max([1, *shape]):
        start = spec.minimum if spec.minimum is not None else 0
        values = [str(given.get(f"{spec.name}:{index}", f"{start:g}")) for index in range(count)]
        return Field(name=spec.name, kind="numbers", hint=hint, values=values)
    example = ""
    if not is_alternative and count <= MAX_EXAMPLE_NUMBERS:
        example = json.dumps(example_value(spec))
    value = str(given.get(spec.name, example))
    return Field(
        name=spec.name,
        kind="json",
        hint=f"Nested lists: {hint}",
        value=value,
        is_alternative=is_alternative,
    )


def _shape(spec: TensorSpec) -> str:
    sizes = ["any" if size is None else str(size) for size in spec.shape]
    return " \N{MULTIPLICATION SIGN} ".join(sizes) or "one number"


def _range(spec: TensorSpec) -> str:
    if spec.minimum is None and spec.maximum is None:
        return ""
    if spec.maximum is None:
        return f", at least {spec.minimum:g}"
    return (
        f", {spec.minimum:g} to {spec.maximum:g}"
        if spec.minimum is not None
        else (f", at most {spec.maximum:g}")
    )


# --- what was sent ----------------------------------------------------------------------


def _given_texts(text: str, manifest: Manifest) -> Given:
    assert manifest.text is not None, "asked by the caller"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InvalidRequest("Write at least one line of text.", param="texts")
    rows: list[str | list[str]] = [
        [part.strip() for part in line.split(PAIR, 1)]
        if manifest.text.takes_pairs and PAIR in line
        else line
        for line in lines
    ]
    return Given(texts=checked_texts(rows, manifest))


def _given_numbers(form: Any, schema: Schema) -> list[Tensor]:
    values = {spec.name: _value(spec, form) for spec in schema.inputs}
    texts = {
        name: value.encode("utf-8", "replace")
        for name, value in values.items()
        if isinstance(value, str)
    }
    return tensors_of_values(values | decode_lists(texts, "{}"), schema)


def _value(spec: TensorSpec, form: Any) -> Any:
    """Numbers, or the text of JSON."""
    shape = example_shape(spec)
    count = math.prod(shape) if math.prod(shape) <= MAX_NUMBER_FIELDS else 0
    fields = [form.get(f"{spec.name}:{index}") for index in range(count)]
    if fields and all(isinstance(field, str) for field in fields):
        return _nested([_number(spec, str(field)) for field in fields], shape)
    text = str(form.get(spec.name, "")).strip()
    if not text:
        raise InvalidRequest(f"Give {spec.name} its numbers.", param=spec.name)
    return text


def _number(spec: TensorSpec, text: str) -> Any:
    if spec.dtype == "bool":
        return text.strip().lower() in ("1", "true", "yes", "on")
    try:
        number = float(text)
    except ValueError:
        raise InvalidRequest(f"{spec.name}: {text[:40]!r} is no number.", param=spec.name) from None
    if not number.is_integer() or abs(number) > 2**64:
        return number
    try:
        return int(text)  # a float keeps 53 bits of it
    except ValueError:  # 1.0, or 1e3
        return int(number)


def _nested(numbers: list[Any], shape: list[int]) -> Any:
    """The numbers as lists of that shape, in C order."""
    value: list[Any] = numbers
    for size in reversed(shape[1:]):
        value = [value[start : start + size] for start in range(0, len(value), size)]
    return value if shape else numbers[0]
