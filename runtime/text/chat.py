"""Chat templates: a list of messages to the one text that the model was trained on.

Owns rendering, as `apply_chat_template` of transformers does it, and its failures. Does not own
what a template may do (template_environment.py), what it is given (chat_values.py), nor tokenising.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import jinja2

from runtime.protocol import ChatMessage, Tool
from runtime.text.chat_values import ChatValueError, message_values, tool_values
from runtime.text.printable import printable
from runtime.text.template_bounds import check_size
from runtime.text.template_environment import BoundedEnvironment
from runtime.text.tokenizer import Tokenizer, read_json
from runtime.text.tool_format import PLAIN_FORMAT, ToolFormat, find_tool_format
from runtime.text.tool_prompt import instruction, plain_messages, with_instruction


class ChatTemplateError(Exception):
    """The template cannot be used, or refuses these messages. The message says why."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ToolSupport(NamedTuple):
    """How tools are told to the model: by the template, or (not `is_native`) by an instruction of
    ours. Some templates take arguments as text, most as an object."""

    form: ToolFormat
    is_native: bool
    is_argument_text: bool


class ChatTemplate:
    """A compiled template. Safe to use from several threads."""

    def __init__(
        self, source: str, special_tokens: dict[str, str], tool_source: str | None = None
    ) -> None:
        """`tool_source` is a template of its own for chats with tools. Raises `ChatTemplateError`
        when a source is not a template."""
        self._environment = BoundedEnvironment()
        self._special_tokens = special_tokens
        self._template = self._compiled(source)
        self._tool_template = self._template if tool_source is None else self._compiled(tool_source)

    def _compiled(self, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except Exception as error:  # of Jinja, or of Python, which compiles what Jinja makes
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """From `chat_template.jinja`, else `chat_template.json`, as processors are saved with,
        else `tokenizer_config.json`. None when there is none."""
        path = directory / "chat_template.jinja"
        if path.is_file():
            try:
                return cls(path.read_text("utf-8"), tokenizer.special_tokens)
            except UnicodeDecodeError as error:
                raise ChatTemplateError(f"chat_template.jinja is not UTF-8: {error}") from error
        source: object = read_json(directory / "chat_template.json").get("chat_template")
        if source is None:
            source = read_json(directory / "tokenizer_config.json").get("chat_template")
        if isinstance(source, list):  # several named ones
            named = [each for each in cast(list[object], source) if isinstance(each, dict)]
            templates = {each.get("name"): each.get("template") for each in named}
            source, for_tools = templates.get("default"), templates.get("tool_use")
            if isinstance(source, str) and isinstance(for_tools, str):
                return cls(source, tokenizer.special_tokens, for_tools)
        return cls(source, tokenizer.special_tokens) if isinstance(source, str) else None

    def render(self, messages: list[ChatMessage], tools: list[Tool] | None = None) -> str:
        """The text of a chat, up to where the model's answer begins. Raises
        `ChatTemplateError`."""
        uses_tools = tools or any(each.tool_calls or each.role == "tool" for each in messages)
        if not uses_tools:
            return self._render(self._template, message_values(messages), None)
        if self.tool_support.is_native:
            is_argument_text = self.tool_support.is_argument_text
            text = self._render_native(messages, tools or [], is_argument_text=is_argument_text)
        else:
            text = self._render_plain(messages, tools or [])
        if printable(text) != text:
            raise ChatTemplateError("tools or calls hold a lone surrogate, which is no character")
        return text

    @cached_property
    def tool_support(self) -> ToolSupport:
        """Found by evaluating the template, the first time it is asked for."""
        for is_argument_text in (False, True):

            def render(
                messages: list[ChatMessage],
                tools: list[Tool],
                is_prompt: bool,
                is_argument_text: bool = is_argument_text,
            ) -> str | None:
                try:
                    return self._render_native(
                        messages, tools, is_argument_text=is_argument_text, is_prompt=is_prompt
                    )
                except ChatTemplateError:
                    return None

            form = find_tool_format(render)
            if form is not None:
                return ToolSupport(form, True, is_argument_text)
        return ToolSupport(PLAIN_FORMAT, False, False)

    def _render_native(
        self,
        messages: list[ChatMessage],
        tools: list[Tool],
        *,
        is_argument_text: bool,
        is_prompt: bool = True,
    ) -> str:
        try:
            values = message_values(messages, is_argument_text=is_argument_text)
            listed = [tool_values(tool) for tool in tools] or None
        except ChatValueError as error:
            raise ChatTemplateError(str(error)) from error
        return self._render(self._tool_template, values, listed, is_prompt=is_prompt)

    def _render_plain(self, messages: list[ChatMessage], tools: list[Tool]) -> str:
        """For a template that knows nothing of tools: they are described in the system message,
        or in the user's first where the template has none."""
        messages = plain_messages(messages)
        if not tools:
            return self._render(self._template, message_values(messages), None)
        try:
            told = instruction(tools)
        except ChatValueError as error:
            raise ChatTemplateError(str(error)) from error
        try:
            in_system = message_values(with_instruction(messages, told, "system"))
            text = self._render(self._template, in_system, None)
            if told in text:
                return text
        except ChatTemplateError:
            pass  # it refuses system messages, or the chat as such, which the next shows
        in_user = message_values(with_instruction(messages, told, "user"))
        return self._render(self._template, in_user, None)

    def _render(
        self,
        template: jinja2.Template,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        is_prompt: bool = True,
    ) -> str:
        variables = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": is_prompt,
            **self._special_tokens,
        }
        pieces: list[str] = []
        num_characters = 0
        self._environment.start_clock()
        try:
            for piece in template.generate(variables):
                pieces.append(piece)
                num_characters += len(piece)
                check_size(num_characters)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template says: {error}") from error
        # A template can fail in any way Python can.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ChatTemplateError(f"the model's chat template failed: {reason}") from error
        return "".join(pieces)
