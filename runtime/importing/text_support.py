"""Finds out what a decoder's directory can do with text: prompts, chats, or token ids only."""

from pathlib import Path

import msgspec

from runtime.protocol import DecoderInfo
from runtime.text.chat import ChatTemplate, ChatTemplateError
from runtime.text.template_allowance import measure_template_allowance
from runtime.text.tokenizer import Tokenizer, TokenizerError


def check_text(directory: Path, info: DecoderInfo) -> tuple[DecoderInfo, list[str]]:
    """What of tokenizer and chat template can be used, how many tokens a template adds, and
    notes on what cannot. A model without them still takes token ids."""
    replace = msgspec.structs.replace
    try:
        tokenizer = Tokenizer.load(directory)
    except TokenizerError as error:
        note = f"Text is not served, only token ids: {error}."
        return replace(info, has_tokenizer=False, has_chat_template=False), [note]
    info = replace(info, has_tokenizer=True)
    try:
        template = ChatTemplate.load(directory, tokenizer)
        if template is None:
            note = "Chat is not served, only completions: there is no chat template."
            return replace(info, has_chat_template=False), [note]
        allowance = measure_template_allowance(template, tokenizer)
    except (ChatTemplateError, TokenizerError) as error:
        note = f"Chat is not served, only completions: {error}."
        return replace(info, has_chat_template=False), [note]
    return replace(
        info,
        has_chat_template=True,
        template_tokens=allowance.per_request,
        template_tokens_per_message=allowance.per_message,
        template_tokens_per_tool_use=allowance.per_tool_use,
        template_tool_factor=allowance.tool_factor,
    ), []
