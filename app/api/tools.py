"""Tools and answer formats of the APIs for text, as a worker wants them.

Owns what their fields mean and their refusals. Whether a schema can be enforced is the worker's
to say.
"""

from collections.abc import Sequence

import msgspec

from app.api.openai_types import FunctionTool, Message, NamedToolChoice, ResponseFormat
from app.api.sampling import not_supported
from app.core.errors import InvalidRequest
from runtime.protocol import Tool, ToolCall

MAX_SCHEMA_BYTES = 64 * 1024
ANY_OBJECT = "{}"


def json_schema_of(wanted: ResponseFormat | None, param: str = "response_format") -> str | None:
    """The schema of the answer, None for text. Raises `InvalidRequest`."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.type != "json_schema":
        raise not_supported(param, f"the format {wanted.type!r} is")
    if wanted.json_schema is None:
        raise InvalidRequest(f"{param}.json_schema is required.", param=f"{param}.json_schema")
    return schema_text(wanted.json_schema.schema, param) or ANY_OBJECT


def tools_of(tools: Sequence[FunctionTool] | None) -> list[Tool]:
    """Raises `InvalidRequest`."""
    return [_tool(tool, at) for at, tool in enumerate(tools or [])]


def tool_choice_of(choice: str | NamedToolChoice | None, tools: Sequence[Tool]) -> str:
    """In the worker's words. Raises `InvalidRequest`."""
    if isinstance(choice, NamedToolChoice):
        if choice.type != "function" or choice.function is None:
            raise not_supported("tool_choice", "choices other than of a function are")
        name = choice.function.name
        if all(tool.name != name for tool in tools):
            raise InvalidRequest(
                f"tool_choice: there is no tool {name!r} in tools.", param="tool_choice"
            )
        return f"function:{name}"
    if choice not in (None, "none", "auto", "required"):
        raise InvalidRequest(
            "tool_choice must be none, auto, required, or name a function.", param="tool_choice"
        )
    if choice == "required" and not tools:
        raise InvalidRequest("tool_choice is only allowed with tools.", param="tool_choice")
    return choice or "auto"


def tool_calls_of(message: Message, i: int) -> list[ToolCall]:
    """The calls of an earlier answer. Raises `InvalidRequest`."""
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(
            f"messages[{i}].tool_calls: only the assistant calls tools.",
            param=f"messages[{i}].tool_calls",
        )
    return [
        ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or []
    ]


def _tool(tool: FunctionTool, at: int) -> Tool:
    if tool.type != "function":
        raise not_supported(f"tools[{at}].type", f"tools of type {tool.type!r} are")
    function = tool.function
    if function is None:
        raise InvalidRequest(f"tools[{at}].function is required.", param=f"tools[{at}].function")
    parameters = schema_text(function.parameters, f"tools[{at}].function.parameters")
    return Tool(
        name=function.name, description=function.description or "", parameters=parameters or ""
    )


def text_of(raw: msgspec.Raw, param: str) -> str:
    """JSON that is kept as it was sent, whose text nobody has looked at yet. Raises
    `InvalidRequest`."""
    try:
        return bytes(raw).decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{param} is not valid UTF-8.", param=param) from None


def schema_text(raw: msgspec.Raw, param: str) -> str | None:
    """The schema as it was sent; None for none, and for null. Raises `InvalidRequest`."""
    if len(raw) > MAX_SCHEMA_BYTES:
        raise InvalidRequest(
            f"{param}: a schema may have at most {MAX_SCHEMA_BYTES:,} bytes.", param=param
        )
    text = text_of(raw, param)
    if text in ("", "null"):
        return None
    if not text.startswith("{"):
        raise InvalidRequest(f"{param}: a schema must be a JSON object.", param=param)
    return text
