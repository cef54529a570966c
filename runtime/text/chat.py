"""Chat templates: a list of messages to the one text that the model was trained on.

Owns rendering, as `apply_chat_template` of transformers does it, and its failures. Does not own
what a template may do (template_environment.py), nor tokenising.
"""

from pathlib import Path
from typing import cast

import jinja2

from runtime.protocol import ChatMessage
from runtime.text.printable import printable
from runtime.text.template_bounds import check_size
from runtime.text.template_environment import BoundedEnvironment
from runtime.text.tokenizer import Tokenizer, read_json


class ChatTemplateError(Exception):
    """The template cannot be used, or refuses these messages. The message says why."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ChatTemplate:
    """A compiled template. Safe to use from several threads."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Raises `ChatTemplateError` when the source is not a template."""
        self._environment = BoundedEnvironment()
        self._special_tokens = special_tokens
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # of Jinja, or of Python, which compiles what Jinja makes
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """From `chat_template.jinja`, else `tokenizer_config.json`. None when there is neither."""
        path = directory / "chat_template.jinja"
        if path.is_file():
            try:
                return cls(path.read_text("utf-8"), tokenizer.special_tokens)
            except UnicodeDecodeError as error:
                raise ChatTemplateError(f"chat_template.jinja is not UTF-8: {error}") from error
        source: object = read_json(directory / "tokenizer_config.json").get("chat_template")
        if isinstance(source, list):  # several named ones
            named = [each for each in cast(list[object], source) if isinstance(each, dict)]
            templates = {each.get("name"): each.get("template") for each in named}
            source = templates.get("default")
        return cls(source, tokenizer.special_tokens) if isinstance(source, str) else None

    def render(self, messages: list[ChatMessage]) -> str:
        """The text of a chat, up to where the model's answer begins. Raises
        `ChatTemplateError`."""
        variables = {
            "messages": [_as_dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._special_tokens,
        }
        pieces: list[str] = []
        num_characters = 0
        self._environment.start_clock()
        try:
            for piece in self._template.generate(variables):
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


def measure_template_allowance(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, int]:
    """The most tokens the template adds to messages' own text: (per request, per message).

    Measured on chats of one-letter messages; shapes that the template refuses do not count. Some
    tokens are added for merges across the borders of messages, which differ with their text.
    """
    system = [ChatMessage(role="system", content="x")]
    turns = [ChatMessage(role=role, content="x") for role in ("user", "assistant")] * 4
    chats = [start + turns[:count] for start in ([], system) for count in range(1, 8)]
    added: dict[int, int] = {}  # number of messages -> most tokens beyond their text
    for messages in chats:
        try:
            text = template.render(messages)
        except ChatTemplateError:
            continue
        num_added = len(tokenizer.encode(text, is_templated=True)) - len(messages)
        added[len(messages)] = max(num_added, added.get(len(messages), 0))
    if not added:
        raise ChatTemplateError("the chat template refuses every chat, even one user message")
    counts = sorted(added)
    per_message = max(
        (
            -(-(added[more] - added[fewer]) // (more - fewer))
            for at, more in enumerate(counts)
            for fewer in counts[:at]
        ),
        default=max(added.values()),
    )
    per_message = max(per_message, 0)
    per_request = max(0, *(added[count] - count * per_message for count in counts))
    return per_request + 8, per_message + 4


def _as_dict(message: ChatMessage) -> dict[str, str]:
    fields = {"role": message.role, "content": message.content}
    return fields if message.name is None else fields | {"name": message.name}
