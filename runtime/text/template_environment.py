"""The Jinja environment that chat templates run in: what transformers offers them, within bounds.

Owns the bounds of time and size, for a template is a program that came with somebody's model.
Does not own what a chat is (chat.py).
"""

import json
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from runtime.text.template_bounds import (
    BoundExceededError,
    bounded_filters,
    check_format,
    check_indent,
    check_size,
    size_of,
)

MAX_CPU_SECONDS = 2.0


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment that transformers renders in, and a clock.

    Every pass through a loop and every call of a macro looks at the clock, so that no template
    runs for long; every joined text, sum, product and power is bounded, so that none grows
    large. What gets past these (one enormous call of a string method) meets the memory limit of
    the process.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, jinja2.ext.loopcontrols],
        )
        self._render = threading.local()  # the deadline of what this thread renders
        self.concat = _join  # pyright: ignore[reportAttributeAccessIssue]
        self.filters |= bounded_filters(self.filters)
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = TemplateDict()
        self.globals["namespace"] = TemplateNamespace

    def start_clock(self) -> None:
        # Of this thread's own time, so that a busy machine refuses no honest template.
        self._render.deadline = time.thread_time() + MAX_CPU_SECONDS

    def tick(self) -> None:
        if time.thread_time() > self._render.deadline:
            raise BoundExceededError(f"it ran for longer than {MAX_CPU_SECONDS:g} seconds")

    def join_operands(self, *operands: Any) -> str:
        """What `a ~ b` does."""
        return _join(operands)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and isinstance(right, int) != isinstance(left, int):
            repeated, count = (left, right) if isinstance(right, int) else (right, left)
            check_size(size_of(repeated) * (count if isinstance(count, int) else 1))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_size(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            check_format(left, right)
        result = super().call_binop(context, operator, left, right)
        check_size(size_of(result))
        return result

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, nodes.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno))
        return cast(nodes.Template, BoundedConcatenation().visit(tree))


class BoundedConcatenation(NodeTransformer):
    """Turns `a ~ b` into a call of `BoundedEnvironment.join_operands`."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("join_operands", node.nodes, node.lineno)


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's words for training, means nothing here."""

    tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateDict:
    """The built-in `dict`, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """A namespace that takes no name with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named parameters, so that `namespace(self=...)` works, as in Jinja's own.
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot store {name!r}")


def _call(method: str, operands: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of a method of the environment, which no template can redefine."""
    attribute = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(attribute, operands, [], None, None, lineno=line)


def _join(parts: Iterable[Any]) -> str:
    pieces = [str(part) for part in parts]
    check_size(sum(map(len, pieces)))
    return "".join(pieces)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of Jinja's own filter."""
    check_indent(indent)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now(UTC).astimezone().strftime(format)
