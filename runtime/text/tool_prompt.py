"""Tools for models whose chat template knows nothing of them: told in words.

Owns the instruction and the way calls and their results read in the chat. Its format is
`PLAIN_FORMAT` of tool_format.py.
"""

import json
from typing import Literal

from runtime.protocol import ChatMessage, Tool, ToolCall
from runtime.text.chat_values import tool_values
from runtime.text.tool_format import PLAIN_FORMAT

_INSTRUCTION = """\
You may call functions. These are the functions, one JSON object per line:
<tools>
{tools}
</tools>
To call a function, write the following and nothing after it but further calls:
<tool_call>
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>
The result of each call is given to you between <tool_response> and </tool_response>."""


def instruction(tools: list[Tool]) -> str:
    """Raises `ChatValueError`."""
    lines = [json.dumps(tool_values(tool)["function"], ensure_ascii=False) for tool in tools]
    return _INSTRUCTION.format(tools="\n".join(lines))


def plain_messages(messages: list[ChatMessage]) -> list[ChatMessage]:
    """The chat without roles and fields that only tools have. Results that follow one another
    become one message of the user, since many templates want roles to take turns."""
    plain: list[ChatMessage] = []
    is_result = False
    for message in messages:
        if message.role == "tool":
            text = f"<tool_response>\n{message.content}\n</tool_response>"
            if is_result:
                text = f"{plain.pop().content}\n{text}"
            plain.append(ChatMessage(role="user", content=text))
        elif message.tool_calls:
            calls = [_call_text(call) for call in message.tool_calls]
            text = "\n".join([message.content, *calls] if message.content else calls)
            plain.append(ChatMessage(role=message.role, content=text, name=message.name))
        else:
            plain.append(message)
        is_result = message.role == "tool"
    return plain


def _call_text(call: ToolCall) -> str:
    form = PLAIN_FORMAT
    return f"{form.first}{call.name}{form.middle}{call.arguments}{form.last}"


def with_instruction(
    messages: list[ChatMessage], told: str, role: Literal["system", "user"]
) -> list[ChatMessage]:
    """The chat with the instruction in its system message, or in its first of `role`."""
    rest = list(messages)
    if role == "user":
        at = next((at for at, each in enumerate(rest) if each.role == "user"), None)
        if at is not None:
            rest[at] = ChatMessage(role="user", content=f"{told}\n\n{rest[at].content}")
            return rest
    if rest and rest[0].role == role:
        return [ChatMessage(role=role, content=f"{rest[0].content}\n\n{told}"), *rest[1:]]
    return [ChatMessage(role=role, content=told), *rest]
