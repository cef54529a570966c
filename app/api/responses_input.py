"""What is sent to `/v1/responses` as the messages of a chat.

Owns the order of items and the refusal of those that no model here takes.
"""

from typing import TypeVar

from app.api.chat import ROLE_OF
from app.api.responses_types import InputItem, InputPart, ResponsesRequest
from app.api.sampling import not_supported
from app.core.errors import InvalidRequest
from runtime.protocol import ChatMessage, ToolCall

T = TypeVar("T")
TEXT_PARTS = frozenset({"input_text", "output_text", "text"})


def messages_of(request: ResponsesRequest) -> list[ChatMessage]:
    """Raises `InvalidRequest` naming the item that is wrong."""
    messages: list[ChatMessage] = []
    if request.instructions:
        messages.append(ChatMessage(role="system", content=request.instructions))
    if isinstance(request.input, str):
        return [*messages, ChatMessage(role="user", content=request.input)]
    if not request.input:
        raise InvalidRequest("input must not be empty.", param="input")
    for at, item in enumerate(request.input):
        where = f"input[{at}]"
        if item.type == "reasoning":
            continue  # another model's thoughts, which this one could not read
        if item.type == "function_call":
            _add_call(messages, _call(item, where))
            continue
        message = _message(item, where)
        if message.role == "assistant" and not message.content and _follows_assistant(messages):
            continue  # it says nothing, and would part calls of one answer
        messages.append(message)
    return messages


def _message(item: InputItem, where: str) -> ChatMessage:
    if item.type == "function_call_output":
        return ChatMessage(
            role="tool",
            content=_text(_required(item.output, f"{where}.output"), f"{where}.output"),
            tool_call_id=_required(item.call_id, f"{where}.call_id"),
        )
    if item.type == "item_reference":
        raise not_supported(
            f"{where}.type",
            "no answer is kept here, so that items are sent whole; item_reference is",
        )
    if item.type != "message":
        raise not_supported(f"{where}.type", f"items of type {item.type!r} are")
    role = _required(item.role, f"{where}.role")
    content = _required(item.content, f"{where}.content")
    return ChatMessage(role=ROLE_OF.get(role, role), content=_text(content, f"{where}.content"))


def _call(item: InputItem, where: str) -> ToolCall:
    return ToolCall(
        id=_required(item.call_id, f"{where}.call_id"),
        name=_required(item.name, f"{where}.name"),
        arguments=_required(item.arguments, f"{where}.arguments"),
    )


def _add_call(messages: list[ChatMessage], call: ToolCall) -> None:
    """To the assistant's message before it: one answer is one message. Nothing of it is copied, as
    there may be thousands of calls."""
    if not _follows_assistant(messages):
        messages.append(ChatMessage(role="assistant", content=""))
    messages[-1].tool_calls.append(call)


def _follows_assistant(messages: list[ChatMessage]) -> bool:
    return bool(messages) and messages[-1].role == "assistant"


def _text(content: str | list[InputPart], where: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_part(part, f"{where}[{at}]") for at, part in enumerate(content))


def _part(part: InputPart, where: str) -> str:
    if part.type == "refusal":
        return _required(part.refusal, f"{where}.refusal")
    if part.type not in TEXT_PARTS:
        raise not_supported(f"{where}.type", f"content of type {part.type!r} is")
    return _required(part.text, f"{where}.text")


def _required(value: T | None, where: str) -> T:
    if value is None:
        raise InvalidRequest(f"{where} is required.", param=where)
    return value
