"""What a request's answer may be: JSON of a schema, calls of tools, or anything.

Owns the refusals of `response_format` and `tools`. Does not own grammars nor formats
(runtime.text).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

import msgspec

from runtime.engine.kept import Kept
from runtime.protocol import Generate, Tool, WireError
from runtime.scheduling.validation import RequestError, refusal
from runtime.text.chat import ChatTemplate
from runtime.text.grammars import (
    Grammar,
    GrammarBusyError,
    GrammarCompiler,
    GrammarError,
    GrammarUnavailableError,
    schema_source,
)
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_calls import ToolCallReader
from runtime.text.tool_grammar import check_tools, tools_source

NAMED = "function:"


@dataclass(frozen=True, slots=True)
class Constraint:
    """The grammar of every choice. With tools, also how to read calls, and a tokenizer that
    shows the special tokens which announce them."""

    grammar: Grammar
    make_reader: Callable[[], ToolCallReader] | None = None
    tokenizer: Tokenizer | None = None


def offered_tools(generate: Generate) -> list[Tool]:
    """Those that the model is told of."""
    return [] if generate.tool_choice == "none" else generate.tools


class Constraints:
    """Makes the constraints of requests to one model. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
        eos_token_ids: Iterable[int],
        vocab_size: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._compiler = (
            None if tokenizer is None else GrammarCompiler(tokenizer, eos_token_ids, vocab_size)
        )
        self._kept = Kept[Constraint | WireError]()  # refusals as well

    def to_compile(self, generate: Generate) -> bytes | None:
        """What tells the grammar from others, while `constraint_of` would take its time."""
        source = _source_of(generate)
        if source is None:
            return None
        key = _key_of(source)
        return None if self._kept.get(generate.fairness_key, key) is not None else key

    def constraint_of(self, generate: Generate) -> Constraint | None:
        """None where anything may be said. Raises `RequestError`."""
        source = _source_of(generate)
        if source is None:
            return None
        owner, key = generate.fairness_key, _key_of(source)
        made = self._kept.get(owner, key)
        if made is None:
            try:
                made = self._make(generate)
            except RequestError as error:
                made = error.error
            except GrammarBusyError as error:
                raise RequestError(_busy(str(error))) from error
            # A refusal is as small as its text.
            size = len(source) if isinstance(made, Constraint) else 0
            self._kept.put(owner, key, made, size)
        if isinstance(made, WireError):
            raise RequestError(made)
        return made

    def _make(self, generate: Generate) -> Constraint:
        """Raises `RequestError` or `GrammarBusyError`."""
        if offered_tools(generate):
            return self._of_tools(generate)
        assert generate.json_schema is not None
        if self._compiler is None:
            message = "this model has no tokenizer; it cannot be held to a format"
            raise refusal(message, "response_format")
        try:
            return Constraint(self._compiler.compile(schema_source(generate.json_schema)))
        except (GrammarError, GrammarUnavailableError) as error:
            raise refusal(f"response_format: {error}", "response_format") from error

    def check(self, generate: Generate) -> None:
        """What is wrong before the prompt is made. Raises `RequestError`."""
        names = {tool.name for tool in generate.tools}
        choice = generate.tool_choice
        if choice.startswith(NAMED) and choice.removeprefix(NAMED) not in names:
            raise refusal("tool_choice names none of the tools", "tool_choice")
        if choice == "required" and not names:
            raise refusal("tool_choice is 'required', but there are no tools", "tool_choice")
        if not (choice.startswith(NAMED) or choice in ("none", "auto", "required")):
            raise refusal("tool_choice must be none, auto, required or a function", "tool_choice")
        if generate.tools and generate.messages is None:
            raise refusal("tools need messages", "tools")
        try:
            check_tools(generate.tools)
        except GrammarError as error:
            raise refusal(f"tools: {error}", "tools") from error

    def _of_tools(self, generate: Generate) -> Constraint:
        assert self._compiler is not None
        assert self._tokenizer is not None
        assert self._chat_template is not None
        form = self._chat_template.tool_support.form
        choice = generate.tool_choice
        is_named = choice.startswith(NAMED)
        name = choice.removeprefix(NAMED)
        callable_tools = [each for each in generate.tools if not is_named or each.name == name]
        try:
            source = tools_source(
                form,
                self._tokenizer,
                callable_tools,
                is_required=is_named or choice == "required",
                allows_several=generate.allows_several_calls and not is_named,
                json_schema=generate.json_schema,
            )
            grammar = self._compiler.compile(source)
        except (GrammarError, GrammarUnavailableError) as error:
            raise refusal(f"tools: {error}", "tools") from error
        pieces = "".join((form.first, form.middle, form.between or "", form.last))
        shown = {
            token_id
            for text in self._tokenizer.special_texts
            if text in pieces and (token_id := self._tokenizer.special_id(text)) is not None
        }
        trigger = form.trigger(self._tokenizer.special_texts)
        return Constraint(
            grammar, partial(ToolCallReader, form, trigger), self._tokenizer.showing(shown)
        )


def _source_of(generate: Generate) -> bytes | None:
    """All that a constraint is made of; None where there is none, or no answer to hold to it."""
    tools = offered_tools(generate)
    if generate.is_count or (not tools and generate.json_schema is None):
        return None
    choice = (generate.tool_choice, generate.allows_several_calls) if tools else ()
    return msgspec.msgpack.encode((tools, choice, generate.json_schema))


def _key_of(source: bytes) -> bytes:
    return blake2b(source, digest_size=16).digest()


def _busy(message: str) -> WireError:
    return WireError(type="rate_limit_error", code="grammars_busy", message=message, status=429)
