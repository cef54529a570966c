"""What an owner says of a model's inputs, as text: one input per line, or parted by `;`.

`image: float32[batch, 3, 224, 224] in 0..1`: a name, a dtype, the axes, and the values it takes.
An axis is a size, or the name of one that may vary (`tokens`, `tokens<=512`, `2<=tokens<=512`).
Owns the grammar and what of it is remembered; what fits a file, its build finds out.
"""

import math
import re
from difflib import get_close_matches

import msgspec

from app.core.errors import InvalidRequest
from runtime.protocol import BuildHints, InputHint

MAX_TEXT_CHARS = 16_384
MAX_INPUTS = 256
MAX_AXES = 16
MAX_SIZE = 2**31 - 1
EXAMPLE = "image: float32[batch, 3, 224, 224] in 0..1"
_BITS = (8, 16, 32, 64)
INTEGERS = {f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in _BITS} | {
    f"uint{bits}": (0, 2**bits - 1) for bits in _BITS
}
FLOATS = ("float16", "bfloat16", "float32", "float64")
DTYPES = (*FLOATS, *INTEGERS, "bool", "complex64", "complex128")

_INPUT = re.compile(
    r"(?P<name>\S(?:.*?\S)?)\s*:\s*(?P<dtype>\w+)\s*\[(?P<axes>[^\[\]]*)\]\s*(?P<rest>.*)"
)
_AXIS = re.compile(r"(?:(?P<least>\d+)\s*<=\s*)?(?P<name>[A-Za-z_]\w*)(?:\s*<=\s*(?P<most>\d+))?")
_NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"in\s+(?P<least>{_NUMBER})\s*\.\.\s*(?P<most>{_NUMBER})")


class Said(msgspec.Struct, frozen=True):
    """What came with one upload. None: nothing was said, so what the model's last version was
    built with holds on."""

    inputs: list[InputHint] | None = None
    accepts_loss: bool | None = None


def read_said(inputs: str | None, accepts_loss: bool | None) -> Said:
    """Raises `InvalidRequest`. A text without inputs forgets those of earlier versions."""
    return Said(None if inputs is None else parse_inputs(inputs), accepts_loss)


def with_remembered(said: Said, last: BuildHints) -> BuildHints:
    """The hints of a new version, `last` being those of the one before."""
    loss = last.accepts_loss if said.accepts_loss is None else said.accepts_loss
    if said.inputs is not None:
        return BuildHints(inputs=said.inputs, accepts_loss=loss)
    return BuildHints(inputs=last.inputs, accepts_loss=loss, is_remembered=bool(last.inputs))


def show_inputs(inputs: list[InputHint]) -> str:
    """The text that `parse_inputs` reads, one input per line."""
    return "\n".join(hint.text for hint in inputs)


def parse_inputs(text: str) -> list[InputHint]:
    """Raises `InvalidRequest`, which names the place and shows how it is written."""
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidRequest(
            f"The inputs take {len(text):,} characters; {MAX_TEXT_CHARS:,} are the most.",
            param="inputs",
        )
    parts = [part.strip() for line in text.splitlines() for part in line.split(";")]
    parts = [part for part in parts if part and not part.startswith("#")]
    if len(parts) > MAX_INPUTS:
        raise InvalidRequest(f"At most {MAX_INPUTS} inputs can be described.", param="inputs")
    hints = [_parse_input(part) for part in parts]
    _check_together(hints, parts)
    return hints


def _parse_input(part: str) -> InputHint:
    found = _INPUT.fullmatch(part)
    if found is None:
        raise _wrong(part, "is not a name, a dtype and axes in brackets")
    name, dtype = found["name"], found["dtype"]
    if not name.isprintable() or len(name) > 200:
        raise _wrong(part, "has a name that is too long or cannot be printed")
    if dtype not in DTYPES:
        raise _wrong(part, f"has the dtype {dtype[:40]!r}, {_suggest(dtype)}")
    axes, bounds = _parse_axes(found["axes"], part)
    least, most = _parse_range(found["rest"], dtype, part)
    return InputHint(name=name, dtype=dtype, axes=axes, minimum=least, maximum=most, bounds=bounds)


def _suggest(dtype: str) -> str:
    common = {"float": "float32", "int": "int64", "long": "int64", "double": "float64"}
    common |= {"half": "float16", "byte": "uint8", "boolean": "bool"}
    close = [common[dtype]] if dtype in common else get_close_matches(dtype, DTYPES, 1)
    if close:
        return f"which is none; did you mean {close[0]}?"
    return f"which is none of {', '.join(DTYPES)}"


def _parse_axes(text: str, part: str) -> tuple[list[int | str], dict[str, tuple[int, int | None]]]:
    axes: list[int | str] = []
    bounds: dict[str, tuple[int, int | None]] = {}
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if len(words) > MAX_AXES:
        raise _wrong(part, f"has more than {MAX_AXES} axes")
    for word in words:
        if word.isascii() and word.isdigit():
            axes.append(_size(word, part))
            continue
        found = _AXIS.fullmatch(word)
        if found is None:
            raise _wrong(
                part, f"has the axis {word[:40]!r}; an axis is a size, or a name where it varies"
            )
        axes.append(found["name"])
        if found["least"] or found["most"]:
            least = _size(found["least"], part) if found["least"] else 1
            most = _size(found["most"], part) if found["most"] else None
            if most is not None and most < least:
                raise _wrong(part, f"has the axis {word[:40]!r}, which no size fits")
            bounds[found["name"]] = (least, most)
    return axes, bounds


def _size(digits: str, part: str) -> int:
    if len(digits) > 10 or not 1 <= int(digits) <= MAX_SIZE:
        raise _wrong(part, f"has an axis of size {digits[:20]}; sizes are 1 to {MAX_SIZE:,}")
    return int(digits)


def _parse_range(text: str, dtype: str, part: str) -> tuple[float | None, float | None]:
    if not text:
        return None, None
    found = _RANGE.fullmatch(text)
    if found is None:
        raise _wrong(part, f"ends with {text[:40]!r}; values are said as `in 0..1`")
    least, most = float(found["least"]), float(found["most"])
    if not (math.isfinite(least) and math.isfinite(most)) or least > most:
        raise _wrong(part, f"takes values {text[3:40].strip()!r}, which holds no number")
    if dtype == "bool" or dtype.startswith("complex"):
        raise _wrong(part, f"says which values it takes; of {dtype} that cannot be said")
    if dtype in INTEGERS:
        low, high = INTEGERS[dtype]
        if least != int(least) or most != int(most) or least < low or most > high:
            raise _wrong(part, f"takes values {text[3:40].strip()!r}, which are not all {dtype}")
    return least, most


def _check_together(hints: list[InputHint], parts: list[str]) -> None:
    names: set[str] = set()
    bounds: dict[str, tuple[int, int | None]] = {}
    for hint, part in zip(hints, parts, strict=True):
        if hint.name in names:
            raise _wrong(part, "is said twice")
        names.add(hint.name)
        for axis, sizes in hint.bounds.items():
            if bounds.setdefault(axis, sizes) != sizes:
                raise _wrong(part, f"gives the axis {axis!r} other bounds than another input does")


def _wrong(part: str, reason: str) -> InvalidRequest:
    shown = part if len(part) <= 80 else part[:77] + "..."
    return InvalidRequest(
        f"The input {shown!r} {reason}. Write one input per line, for example:\n    {EXAMPLE}",
        param="inputs",
        code="invalid_inputs",
    )
