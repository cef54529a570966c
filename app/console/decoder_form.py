"""The form that tries a decoder out: what it holds, and the request that is made of it.

A model with a chat template is talked to, turn by turn; one without continues a text; one without
a tokenizer continues a list of token ids. Running the request is `decoder_playground.py`'s.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from app.api.bodies import describe
from app.api.chat import ChatDialect
from app.api.completions import CompletionsDialect
from app.api.dialect import Dialect
from app.api.openai_types import ChatRequest, CompletionRequest
from app.core.errors import InvalidRequest
from app.organizations.principal import Principal
from runtime.protocol import DecoderInfo

MAX_TURNS = 200
DEFAULT_MAX_TOKENS = 256
T = TypeVar("T")


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one side of a conversation said."""

    role: Literal["user", "assistant"]
    content: str


Turns = Annotated[list[Turn], msgspec.Meta(max_length=MAX_TURNS)]
_turns = msgspec.json.Decoder(Turns)


class DecoderForm(msgspec.Struct, frozen=True, kw_only=True):
    """The fields as they were sent: `text` is the next message, or the prompt."""

    text: str = ""
    system: str = ""
    temperature: str = "0.7"
    max_tokens: str = str(DEFAULT_MAX_TOKENS)
    turns: list[Turn] = []

    def said(self, answer: str) -> list[Turn]:
        """The conversation with the message and its answer at the end."""
        return [*self.turns, Turn("user", self.text), Turn("assistant", answer)]


def empty_form(decoder: DecoderInfo) -> DecoderForm:
    """With room for an answer in a short context."""
    limit = min(DEFAULT_MAX_TOKENS, max(1, decoder.max_context_tokens // 2))
    return DecoderForm(max_tokens=str(limit))


def read_decoder_form(form: Any) -> DecoderForm:
    """Raises `InvalidRequest` for a conversation that this page did not make."""
    fields = {
        name: str(form.get(name, ""))
        for name in ("text", "system", "temperature", "max_tokens", "turns")
    }
    try:
        turns = _turns.decode(fields.pop("turns") or "[]")
    except (msgspec.DecodeError, UnicodeError):
        raise InvalidRequest(
            f"The conversation cannot be read, or has more than {MAX_TURNS} turns. Start over.",
            param="turns",
        ) from None
    return DecoderForm(**fields, turns=turns)


def dialect_of(
    form: DecoderForm,
    name: str,
    decoder: DecoderInfo,
    principal: Principal,
    request_id: str,
    *,
    is_stream: bool,
) -> Dialect[Any]:
    """The request as the API takes it. Raises `InvalidRequest`, naming the field."""
    shared = {
        "model": name,
        "temperature": _number("temperature", form.temperature, float),
        "max_tokens": _number("max_tokens", form.max_tokens, int),
        "stream": is_stream,
    }
    if not form.text.strip():
        wanted = "a message" if decoder.has_chat_template else "a prompt"
        raise InvalidRequest(f"Write {wanted} first.", param="text")
    if decoder.has_chat_template:
        system = [{"role": "system", "content": form.system}] if form.system.strip() else []
        turns = [msgspec.structs.asdict(turn) for turn in form.turns]
        messages = [*system, *turns, {"role": "user", "content": form.text}]
        chat = _converted({**shared, "messages": messages}, ChatRequest)
        return ChatDialect(chat, principal, request_id)
    prompt = form.text if decoder.has_tokenizer else _token_ids(form.text)
    completion = _converted({**shared, "prompt": prompt}, CompletionRequest)
    return CompletionsDialect(completion, principal, request_id)


def _converted(fields: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        message, param = describe(error)
        raise InvalidRequest(message, param=param) from None


def _number(name: str, text: str, kind: type[float] | type[int]) -> float | int:
    try:
        number = kind(text)
    except ValueError:
        number = float("nan")
    if not abs(number) < float("inf"):
        words = "a whole number" if kind is int else "a number"
        raise InvalidRequest(f"{name}: {text[:40]!r} is not {words}.", param=name)
    return number


def _token_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InvalidRequest(
            "This model has no tokenizer: give token ids, such as 1, 15, 7.", param="text"
        ) from None
