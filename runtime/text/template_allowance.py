"""How many tokens a chat template adds, measured at build, so that a gateway can bound a claim.

Owns the measurement. Does not own the bound (the control plane's).
"""

import json
from dataclasses import dataclass

from runtime.protocol import ChatMessage, Tool, ToolCall
from runtime.text.chat import ChatTemplate, ChatTemplateError
from runtime.text.tokenizer import Tokenizer

_X = ChatMessage(role="user", content="x")


@dataclass(frozen=True, slots=True)
class TemplateAllowance:
    """The most tokens a template adds to messages' own text, per request and per message; for
    tools: per request that has any, per call and per result; and how many bytes it writes, at
    most, per byte of their JSON."""

    per_request: int
    per_message: int
    per_tool_use: int
    tool_factor: int


def measure_template_allowance(template: ChatTemplate, tokenizer: Tokenizer) -> TemplateAllowance:
    """Measured on chats of one-letter messages; shapes that the template refuses do not count.
    Some tokens are added for merges across the borders of messages, which differ with their
    text. Raises `ChatTemplateError` when it refuses every chat."""
    per_request, per_message = _measure_messages(template, tokenizer)
    per_tools, tool_factor = _measure_tools(template)
    per_tool_use = max(per_tools, _measure_calls(template))
    return TemplateAllowance(per_request, per_message, per_tool_use, tool_factor)


def _measure_messages(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, int]:
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


def _measure_tools(template: ChatTemplate) -> tuple[int, int]:
    """Bytes, which no tokenizer makes more tokens of: for one small tool, and how many times the
    JSON of larger ones, laid out in lines, is written."""
    small = Tool(name="x", description="x", parameters='{"type": "object", "properties": {}}')
    properties = {f"property_{at}": {"type": "string", "description": "d" * 20} for at in range(4)}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    large = Tool(name="y" * 20, description="z" * 20, parameters=json.dumps(schema))
    renamed = Tool(name="w" * 20, description="z" * 20, parameters=json.dumps(schema))
    try:
        least = _num_bytes(template, []), _num_bytes(template, [small])
    except ChatTemplateError:
        return 0, 1
    per_tools, factor = max(least[1] - least[0], 0), 1
    for tools in ([large], [large, renamed], [small, large, renamed]):
        try:
            num_added = _num_bytes(template, tools) - least[0] - per_tools
        except ChatTemplateError:
            continue
        size = sum(
            len(tool.name + tool.description)
            + len(json.dumps(json.loads(tool.parameters), indent=4))
            for tool in tools
        )
        factor = max(factor, -(-num_added // size))
    return per_tools + 64, factor


def _num_bytes(template: ChatTemplate, tools: list[Tool]) -> int:
    return len(template.render([_X], tools).encode())


def _measure_calls(template: ChatTemplate) -> int:
    """Bytes that one call and its result add beyond two plain messages."""
    call = ToolCall(id="x", name="x", arguments='{"x": "x"}')
    called = ChatMessage(role="assistant", content="x", tool_calls=[call])
    result = ChatMessage(role="tool", content="x", tool_call_id="x")
    plain = [_X, ChatMessage(role="assistant", content="x"), _X]
    try:
        num_added = len(template.render([_X, called, result]).encode())
        num_added -= len(template.render(plain).encode())
    except ChatTemplateError:
        return 0
    return max(num_added, 0) + 64
