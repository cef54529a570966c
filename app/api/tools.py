"""Tools and answer formats of the chat API, as a worker wants them.

Owns what OpenAI's fields mean and their refusals. Whether a schema can be enforced is the worker's
to say.
"""

import msgspec

from app.api.openai_types import ChatRequest, FunctionTool, Message, NamedToolChoice
from app.api.sampling import not_supported
from app.core.errors import InvalidRequest
from runtime.protocol import Tool, ToolCall

MAX_SCHEMA_BYTES = 64 * 1024
ANY_OBJECT = "{}"


def json_schema_of(request: ChatRequest) -> str | None:
    """The schema of the answer, None for text. Raises `InvalidRequest`."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.type != "json_schema":
        raise not_supported("response_format", f"the format {wanted.type!r} is")
    if wanted.json_schema is None:
        raise InvalidRequest(
            "response_format.json_schema is required.", param="response_format.json_schema"
        )
    return _schema(wanted.json_schema.schema, "response_format") or ANY_OBJECT


def tools_of(request: ChatRequest) -> list[Tool]:
    """Raises `InvalidRequest`."""
    return [_tool(tool, at) for at, tool in enumerate(request.tools or [])]


def tool_choice_of(request: ChatRequest) -> str:
    """In the worker's words. Raises `InvalidRequest`."""
    choice = request.tool_choice
    if isinstance(choice, NamedToolChoice):
        if choice.type != "function" or choice.function is None:
            raise not_supported("tool_choice", "choices other than of a function are")
        name = choice.function.name
        if all(tool.function is None or tool.function.name != name for tool in request.tools or []):
            raise InvalidRequest(
                f"tool_choice: there is no tool {name!r} in tools.", param="tool_choice"
            )
        return f"function:{name}"
    if choice not in (None, "none", "auto", "required"):
        raise InvalidRequest(
            "tool_choice must be none, auto, required, or name a function.", param="tool_choice"
        )
    if choice == "required" and not request.tools:
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
    parameters = _schema(function.parameters, f"tools[{at}].function.parameters")
    return Tool(
        name=function.name, description=function.description or "", parameters=parameters or ""
    )


def _schema(raw: msgspec.Raw, param: str) -> str | None:
    """The schema as it was sent; None for none, and for null."""
    if len(raw) > MAX_SCHEMA_BYTES:
        raise InvalidRequest(
            f"{param}: a schema may have at most {MAX_SCHEMA_BYTES:,} bytes.", param=param
        )
    text = bytes(raw).decode("utf-8", "replace")
    if text in ("", "null"):
        return None
    if not text.startswith("{"):
        raise InvalidRequest(f"{param}: a schema must be a JSON object.", param=param)
    return text
