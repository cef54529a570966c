"""The playground's form: which field an input gets, and what is made of what was sent."""

from typing import Any

import msgspec
import pytest

from app.console.playground_form import fields_of, read_form
from app.core.errors import InvalidRequest
from runtime.protocol import ImageInput, Manifest, Schema, TensorSpec, TextInput

LOGITS = TensorSpec(name="logits", dtype="float32", shape=[None, 10])
GREY = ImageInput(height=8, width=8, channels=1, is_channels_first=True)


def manifest_of(*inputs: TensorSpec, **more: Any) -> Manifest:
    schema = Schema(inputs=list(inputs), outputs=[LOGITS], is_batched=True)
    return Manifest(
        kind="tensor", format="pt2", num_parameters=1, weight_bytes=4, schema=schema, **more
    )


IMAGE = TensorSpec(name="image", dtype="float32", shape=[None, 1, 8, 8], image=GREY)
TABLE = TensorSpec(name="x", dtype="float32", shape=[None, 4], minimum=-1.0, maximum=2.0)
IDS = TensorSpec(name="ids", dtype="int64", shape=[None, None])


def test_each_input_gets_the_field_that_suits_it() -> None:
    drawn, numbers = fields_of(manifest_of(IMAGE))
    assert (drawn.kind, drawn.can_be_drawn, numbers.kind) == ("image", True, "json")
    photo = msgspec.structs.replace(
        IMAGE, image=msgspec.structs.replace(GREY, height=224, width=224, channels=3)
    )
    assert not fields_of(manifest_of(photo))[0].can_be_drawn
    (table,) = fields_of(manifest_of(TABLE))
    assert table.kind == "numbers"
    assert table.values == ["-1", "-1", "-1", "-1"]
    assert "-1 to 2" in table.hint
    assert [field.kind for field in fields_of(manifest_of(TABLE, IDS))] == ["numbers", "numbers"]
    text = TextInput(max_tokens=16, takes_pairs=True, token_ids="ids")
    assert [field.kind for field in fields_of(manifest_of(IDS, text=text))] == ["texts"]


async def test_numbers_become_a_row_of_the_inputs_shape() -> None:
    form = {"x:0": "1", "x:1": "0.5", "x:2": "-1e-1", "x:3": "2"}
    given = await read_form(form, manifest_of(TABLE))
    assert given.inputs is not None
    assert given.inputs[0].shape == [1, 4]
    with pytest.raises(InvalidRequest, match="'two' is no number"):
        await read_form(form | {"x:3": "two"}, manifest_of(TABLE))


async def test_json_is_taken_as_it_is_and_refused_in_plain_words() -> None:
    sent = {"x": "[[1, 2, 3, 4], [5, 6, 7, 8]]"}
    given = await read_form(sent, manifest_of(TABLE))
    assert given.inputs is not None
    assert given.inputs[0].shape == [2, 4]
    for text, complaint in (("", "Give x its numbers"), ("[1,", "x is not JSON")):
        with pytest.raises(InvalidRequest, match=complaint):
            await read_form({"x": text}, manifest_of(TABLE))


async def test_lines_are_rows_of_texts_or_pairs() -> None:
    text = TextInput(max_tokens=16, takes_pairs=True, token_ids="ids")
    manifest = manifest_of(IDS, text=text)
    given = await read_form({"texts": "How tall? | It is high.\n\nAlone"}, manifest)
    assert given.texts == [["How tall?", "It is high."], ["Alone"]]
    with pytest.raises(InvalidRequest, match="at least one line"):
        await read_form({"texts": " \n"}, manifest)
