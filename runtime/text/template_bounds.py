"""How large a value a chat template may make, and in how much one call of a filter may do.

Owns the bounds that are checked before a value is made. Does not own the clock, which a single
call cannot look at (template_environment.py).
"""

import re
from collections.abc import Callable, Mapping, Sized
from functools import wraps
from typing import Any, cast

import jinja2

MAX_TEXT_CHARACTERS = 1024 * 1024
MAX_WRAPPED_CHARACTERS = 64 * 1024  # for filters that take microseconds a character
MAX_INDENT = 64

_NUMBER = re.compile(r"\d+")
_STAR_WIDTH = re.compile(r"%[-#0 +.\d]*\*")

Filter = Callable[..., Any]


class BoundExceededError(jinja2.TemplateError):
    """The template ran for too long, or made something too large."""


def size_of(value: Any) -> int:
    """Characters, elements or bits."""
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, Sized) else 1


def check_size(size: int, limit: int = MAX_TEXT_CHARACTERS) -> None:
    if size > limit:
        raise BoundExceededError(f"it makes a value larger than {limit} characters")


def check_indent(indent: Any) -> None:
    """Every line pays for it, as often as it is nested."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > MAX_INDENT:
        raise BoundExceededError(f"it indents by more than {MAX_INDENT} characters")


def check_format(text: str, values: Any) -> None:
    """Bounds `text % values`, from above: every number in `text` is taken for a width."""
    if _STAR_WIDTH.search(text):
        raise BoundExceededError("a width in a format must be a number, not '*'")
    numbers = _NUMBER.findall(text)
    check_size(max(map(len, numbers), default=0), 9)
    check_size(sum(map(int, numbers)))
    if isinstance(values, Mapping):
        values = list(cast(Mapping[Any, Any], values).values())
    elif not isinstance(values, tuple):
        values = [values]
    longest = max((size_of(value) for value in values if not isinstance(value, int)), default=0)
    check_size(text.count("%") * longest)


def bounded_filters(filters: Mapping[str, Filter]) -> dict[str, Filter]:
    """Those of Jinja's own filters of which one call could take seconds or gigabytes."""
    bounded = {name: _checked(filters[name], check) for name, check in _CHECKS.items()}
    return {"format": _format} | bounded


def _checked(apply: Filter, check: Callable[[tuple[Any, ...]], None]) -> Filter:
    """`apply`, whose arguments are first shown to `check`, by name or not."""

    @wraps(apply)  # keeps the mark of a filter that takes the environment as well
    def checked(*args: Any, **kwargs: Any) -> Any:
        check((*args, *kwargs.values()))
        return apply(*args, **kwargs)

    return checked


def _check_counts(args: tuple[Any, ...]) -> None:
    """Of parts to cut into, or of characters to pad to."""
    check_size(max((arg for arg in args if isinstance(arg, int)), default=0))


def _check_text(args: tuple[Any, ...]) -> None:
    _check_counts(args)
    longest = max((len(arg) for arg in args if isinstance(arg, str)), default=0)
    check_size(longest, MAX_WRAPPED_CHARACTERS)


def _check_indent(args: tuple[Any, ...]) -> None:
    for arg in args[1:]:
        check_indent(arg)


_CHECKS = {
    "batch": _check_counts,
    "center": _check_counts,
    "indent": _check_indent,
    "slice": _check_counts,
    "urlize": _check_text,
    "wordwrap": _check_text,
}


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    """Jinja's own, bounded."""
    if args and kwargs:
        raise jinja2.TemplateError("format takes positional or named values, not both")
    text = str(text)
    values = kwargs or args
    check_format(text, values)
    return text % values
