"""The playground's form: which field an input gets, and what is made of what was sent."""

from typing import Any

import msgspec
import numpy as np
import pytest

from app.console.playground import MAX_BARS, shown
from app.console.playground_form import fields_of, read_form
from app.core.errors import InvalidRequest
from runtime.protocol import ImageInput, Manifest, Schema, Tensor, TensorSpec, TextInput
from tests.app.console.conftest import ORIGIN, Console

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
    wrong = [
        ("", "Give x its numbers"),
        ("[1,", "x is not valid JSON"),
        ("[" * 100_000, "x is nested too deeply"),
    ]
    for text, complaint in wrong:
        with pytest.raises(InvalidRequest, match=complaint):
            await read_form({"x": text}, manifest_of(TABLE))


async def test_an_image_that_is_not_given_is_asked_for() -> None:
    with pytest.raises(InvalidRequest, match="Draw or choose an image, or give its numbers"):
        await read_form({"image": " "}, manifest_of(IMAGE))


async def test_fields_are_looked_for_only_where_the_page_has_them() -> None:
    asked: list[str] = []

    class Form(dict[str, str]):
        def get(self, name: str, default: Any = None) -> Any:
            asked.append(name)
            return super().get(name, default)

    image = TensorSpec(name="x", dtype="float32", shape=[None, 3, 2048, 2048])
    with pytest.raises(InvalidRequest, match="takes"):
        await read_form(Form(x="[]"), manifest_of(image))
    assert len(asked) < 9


async def test_whole_numbers_keep_every_digit() -> None:
    ids = TensorSpec(name="ids", dtype="int64", shape=[None, 3])
    form = {"ids:0": "9007199254740993", "ids:1": "-9223372036854775808", "ids:2": "1e3"}
    given = await read_form(form, manifest_of(ids))
    assert given.inputs is not None
    numbers = np.frombuffer(given.inputs[0].data, "<i8").tolist()
    assert numbers == [2**53 + 1, -(2**63), 1000]
    with pytest.raises(InvalidRequest, match="ids must hold"):
        await read_form(form | {"ids:2": "9" * 5_000}, manifest_of(ids))


def tensor_of(values: Any, dtype: str) -> Tensor:
    array = np.array(values, dtype)
    return Tensor(name="y", dtype=dtype, shape=list(array.shape), data=array.tobytes())


def test_whatever_a_model_answers_can_be_shown() -> None:
    bars = shown(tensor_of([[1.0, 3.0, 2.0]], "float32")).bars
    assert bars == [("1", "3", 1000), ("2", "2", 666), ("0", "1", 333)]
    none = [
        tensor_of(np.zeros((2, 0)), "float32"),
        tensor_of(np.zeros((0, 3)), "float32"),
        tensor_of(np.zeros((2, 3, 0)), "float32"),
        tensor_of([[1 + 2j, 2]], "complex64"),
        tensor_of([[True, False]], "bool"),
        tensor_of([[np.nan, np.nan]], "float32"),
        tensor_of([[[1.0, 2.0]]], "float32"),
        tensor_of(1.0, "float64"),
    ]
    for tensor in none:
        assert shown(tensor).bars == []
    assert shown(none[0]).text == "[[], []]"
    widest = shown(tensor_of([[1.7e308, -1.7e308]], "float64")).bars
    assert [bar for *_, bar in widest] == [1000, 0]
    many = tensor_of([list(range(3 * MAX_BARS))], "uint64")
    assert len(shown(many).bars) == MAX_BARS


async def test_lines_are_rows_of_texts_or_pairs() -> None:
    text = TextInput(max_tokens=16, takes_pairs=True, token_ids="ids")
    manifest = manifest_of(IDS, text=text)
    given = await read_form({"texts": "How tall? | It is high.\n\nAlone"}, manifest)
    assert given.texts == [["How tall?", "It is high."], ["Alone"]]
    with pytest.raises(InvalidRequest, match="at least one line"):
        await read_form({"texts": " \n"}, manifest)


async def test_a_form_in_no_charset_is_refused_in_words(owned: Console) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="csrf_token"\r\n'
    body = head + b"Content-Type: text/plain; charset=nope\r\n\r\nabc\r\n--b--\r\n"
    headers = {"Origin": ORIGIN, "Content-Type": "multipart/form-data; boundary=b"}
    answer = await owned.client.post(
        "/console/models/digits/playground", content=body, headers=headers
    )
    assert answer.status_code == 400
    assert "must be text in UTF-8" in answer.text
