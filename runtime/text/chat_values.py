"""Messages and tools as chat templates expect them: plain dicts and lists.

Owns their shape, which is that of transformers. Does not own rendering (chat.py).
"""

import json
import string
from hashlib import sha256
from typing import Any

from runtime.protocol import ChatMessage, Tool, ToolCall
from runtime.text.tool_format import ID_LENGTH

_ALPHANUMERIC = string.ascii_letters + string.digits


class ChatValueError(Exception):
    """A tool or a call holds no JSON. The message says which."""


def message_values(
    messages: list[ChatMessage], *, is_argument_text: bool = False
) -> list[dict[str, Any]]:
    """Raises `ChatValueError`."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    values: list[dict[str, Any]] = []
    for message in messages:
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        name = message.name or names.get(message.tool_call_id or "")
        if name is not None:
            fields["name"] = name
        if message.tool_call_id is not None:
            fields["tool_call_id"] = _short_id(message.tool_call_id)
        if message.tool_calls:
            fields["tool_calls"] = [_call(call, is_argument_text) for call in message.tool_calls]
        values.append(fields)
    return values


def tool_values(tool: Tool) -> dict[str, Any]:
    """Raises `ChatValueError`."""
    parameters = _object(tool.parameters, f"the parameters of {tool.name!r}")
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": parameters or {"type": "object", "properties": {}},
        },
    }


def _call(call: ToolCall, is_argument_text: bool) -> dict[str, Any]:
    arguments = _object(call.arguments, f"the arguments of a call of {call.name!r}")
    return {
        "id": _short_id(call.id),
        "type": "function",
        "function": {
            "name": call.name,
            "arguments": json.dumps(arguments, ensure_ascii=False)
            if is_argument_text
            else arguments,
        },
    }


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        value: object = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ChatValueError(f"{what} are not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ChatValueError(f"{what} must be a JSON object")
    return value


def _short_id(call_id: str) -> str:
    """Nine letters and digits, which some templates insist on, the same for the same id."""
    short = call_id.removeprefix("call_")
    if len(short) == ID_LENGTH and short.isascii() and short.isalnum():
        return short
    digest = sha256(call_id.encode("utf-8", "surrogatepass")).digest()
    return "".join(_ALPHANUMERIC[byte % len(_ALPHANUMERIC)] for byte in digest[:ID_LENGTH])
