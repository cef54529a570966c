"""How owners say what a model takes: the grammar, its refusals, what is remembered."""

import msgspec
import pytest

from app.core.errors import InvalidRequest
from app.registry.input_hints import (
    EXAMPLE,
    Said,
    parse_inputs,
    read_said,
    show_inputs,
    with_remembered,
)
from runtime.protocol import BuildHints, InputHint

IDS = InputHint(
    name="ids",
    dtype="int64",
    axes=["batch", "tokens"],
    minimum=0,
    maximum=30521,
    bounds={"tokens": (2, 512)},
)


def test_an_input_has_a_name_a_dtype_axes_and_perhaps_values() -> None:
    (image,) = parse_inputs("image: float32[batch,3,224,224] in 0..1")
    assert image == InputHint(
        name="image", dtype="float32", axes=["batch", 3, 224, 224], minimum=0, maximum=1
    )


def test_inputs_are_parted_by_lines_or_semicolons_and_may_be_commented() -> None:
    text = "# tokens\nids: int64[batch, 2<=tokens<=512] in 0..30521; mask:bool[batch,tokens]\n\n"
    assert parse_inputs(text) == [IDS, InputHint("mask", "bool", ["batch", "tokens"])]


@pytest.mark.parametrize(
    "text",
    [
        "x: float32[]",
        "x: float64[batch, width] in -1.5..2.5",
        "x: float32[batch] in -0.001..1e+30",
        "serving_default/input:0: uint8[batch, height<=1024, 3] in 0..255",
        IDS.text,
    ],
)
def test_what_is_shown_reads_back_as_the_same(text: str) -> None:
    assert parse_inputs(show_inputs(parse_inputs(text))) == parse_inputs(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x", "is not a name, a dtype and axes"),
        ("x float32[batch]", "is not a name, a dtype and axes"),
        ("x: float32", "is not a name, a dtype and axes"),
        ("x: float32[batch", "is not a name, a dtype and axes"),
        ("x: float[batch]", "did you mean float32?"),
        ("x: flot32[batch]", "did you mean float32?"),
        ("x: banana[batch]", "none of float16, bfloat16"),
        ("x: float32[batch, 0]", "sizes are 1 to"),
        ("x: float32[batch, -1]", "the axis '-1'"),
        ("x: float32[batch, ?]", "the axis '?'"),
        ("x: float32[9<=tokens<=3]", "which no size fits"),
        ("x: float32[1<=2]", "the axis '1<=2'"),
        ("x: float32[99999999999999999999]", "sizes are 1 to"),
        ("x: float32[batch] in 1..0", "holds no number"),
        ("x: float32[batch] in 0..1e999", "holds no number"),
        ("x: float32[batch] in 0-1", "values are said as"),
        ("x: int8[batch] in 0..200", "not all int8"),
        ("x: int8[batch] in 0..1.5", "not all int8"),
        ("x: bool[batch] in 0..1", "cannot be said"),
        ("x: float32[batch]; x: float32[batch]", "is said twice"),
        ("x: float32[n<=3]\ny: float32[n<=4]", "other bounds"),
        ("x: float32[" + ",".join("a" * 17) + "]", "more than 16 axes"),
        (";".join(f"x{index}: bool[n]" for index in range(300)), "At most 256"),
        ("x" * 20_000, "16,384 are the most"),
        ("x\0: bool[n]", "cannot be printed"),
    ],
)
def test_what_is_wrong_is_named_beside_a_right_example(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_inputs(text)
    assert says in caught.value.message
    assert caught.value.param == "inputs"
    if "most" not in says and "At" not in says:
        assert EXAMPLE in caught.value.message


def test_what_is_not_said_is_as_of_the_last_version() -> None:
    last = BuildHints(inputs=[IDS], accepts_loss=True)
    assert with_remembered(Said(), last) == BuildHints(
        inputs=[IDS], accepts_loss=True, is_remembered=True
    )
    assert with_remembered(Said(accepts_loss=False), last).accepts_loss is False
    other = read_said("x: bool[batch]", None)
    assert with_remembered(other, last).inputs == parse_inputs("x: bool[batch]")
    assert with_remembered(other, last).is_remembered is False
    assert with_remembered(read_said("", None), last).inputs == []


def test_hints_survive_the_database() -> None:
    hints = BuildHints(inputs=[IDS], accepts_loss=True)
    assert msgspec.convert(msgspec.to_builtins(hints), BuildHints) == hints
