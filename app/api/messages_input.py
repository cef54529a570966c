"""What is sent to `/v1/messages` as the messages of a chat.

Owns the order of blocks and the refusal of those that no model here takes.
"""

from collections.abc import Sequence

from app.api.messages_types import InputBlock, InputMessage, PromptRequest
from app.api.sampling import not_supported
from app.api.tools import text_of
from app.core.errors import InvalidRequest
from runtime.protocol import ChatMessage, ToolCall

# What a model thought before is not shown to it again, as Anthropic's API has it.
THOUGHTS = frozenset({"thinking", "redacted_thinking"})


def messages_of(request: PromptRequest) -> list[ChatMessage]:
    """Raises `InvalidRequest` naming the block that is wrong."""
    messages: list[ChatMessage] = []
    if request.system:
        messages.append(ChatMessage(role="system", content=_text(request.system, "system")))
    for at, message in enumerate(request.messages):
        messages += _split(message, f"messages[{at}]")
    if request.messages[-1].role == "assistant":
        raise not_supported(
            "messages", "the last message is the assistant's; continuing what it said is"
        )
    return messages


def _split(message: InputMessage, where: str) -> list[ChatMessage]:
    """One message, or several where it holds what tools gave beside text; none where it holds
    thoughts alone."""
    where += ".content"
    if isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content)]
    results: list[ChatMessage] = []
    texts: list[str] = []
    calls: list[ToolCall] = []
    for at, block in enumerate(message.content):
        here = f"{where}[{at}]"
        if block.type == "tool_result" and message.role == "user":
            results.append(_result(block, here))
        elif block.type == "tool_use" and message.role == "assistant":
            calls.append(_call(block, here))
        elif block.type not in THOUGHTS:
            texts.append(_text_of(block, here))
    if message.content and all(block.type in THOUGHTS for block in message.content):
        return []
    if texts or calls or not results:
        said = ChatMessage(role=message.role, content="".join(texts), tool_calls=calls)
        return [*results, said]
    return results


def _result(block: InputBlock, where: str) -> ChatMessage:
    if block.tool_use_id is None:
        raise InvalidRequest(f"{where}.tool_use_id is required.", param=f"{where}.tool_use_id")
    content = _text(block.content or "", f"{where}.content")
    if block.is_error:  # templates know no other way to tell
        content = f"Error: {content}" if content else "Error"
    return ChatMessage(role="tool", content=content, tool_call_id=block.tool_use_id)


def _call(block: InputBlock, where: str) -> ToolCall:
    for name in ("id", "name"):
        if getattr(block, name) is None:
            raise InvalidRequest(f"{where}.{name} is required.", param=f"{where}.{name}")
    arguments = text_of(block.input, f"{where}.input")
    if not arguments.startswith("{"):
        raise InvalidRequest(f"{where}.input must be an object.", param=f"{where}.input")
    return ToolCall(id=block.id or "", name=block.name or "", arguments=arguments)


def _text(content: str | Sequence[InputBlock], where: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_text_of(block, f"{where}[{at}]") for at, block in enumerate(content))


def _text_of(block: InputBlock, where: str) -> str:
    if block.type != "text":
        raise not_supported(f"{where}.type", f"a block of type {block.type!r} here is")
    if block.text is None:
        raise InvalidRequest(f"{where}.text is required.", param=f"{where}.text")
    return block.text
