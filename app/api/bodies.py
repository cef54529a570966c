"""Request bodies: decoded against a schema, with errors that name the field."""

import re
from typing import TypeVar

import msgspec

from app.core.errors import InvalidRequest

T = TypeVar("T")
_AT = re.compile(r"^(?P<problem>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>.*)`$")


def decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """Raises `InvalidRequest` with `param` naming the field that is wrong or missing."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message, param = describe(error)
        raise InvalidRequest(message, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def describe(error: msgspec.ValidationError) -> tuple[str, str | None]:
    """A sentence and the field's path, such as `messages[0].role`."""
    problem, path = str(error), ""
    if located := _AT.match(problem):
        problem, path = located["problem"], located["path"].removeprefix(".")
    if missing := _MISSING.match(problem):
        path = f"{path}.{missing['field']}" if path else missing["field"]
        return f"{path} is required.", path
    if not path:
        return f"{problem}.", None
    return f"{path}: {problem[0].lower()}{problem[1:]}.", path
