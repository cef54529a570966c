"""The values that a request and its answers are made of."""

from typing import Literal

from runtime.protocol.frames import Wire

# `refused`: what the caller's own schema asks for cannot be followed further. Never an answer's.
FinishReason = Literal["stop", "length", "tool_calls", "abort", "error", "refused"]
ServiceClass = Literal["priority", "standard", "batch"]


class Tensor(Wire, frozen=True):
    """`data` is C-ordered, little-endian; `dtype` is numpy's name (`float32`, `int64`, `bool`)."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


class SamplingParams(Wire, frozen=True):
    """How tokens are chosen. `temperature` 0 is greedy; every default is neutral."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None  # number of alternatives to report; None reports none
    logit_bias: dict[int, float] = {}


class TokenLogprob(Wire, frozen=True):
    """`top` holds (token id, token text, logprob), best first. Bytes of `text` may be partial."""

    token_id: int
    text: str
    logprob: float
    top: list[tuple[int, str, float]] = []


class ToolCall(Wire, frozen=True):
    """A function that the model asks to be called. `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


class Tool(Wire, frozen=True):
    """A function that the model may call. `parameters` is a JSON schema as text; empty allows any
    object."""

    name: str
    description: str = ""
    parameters: str = ""


class ChatMessage(Wire, frozen=True):
    """One message of a chat, its content already flattened to text."""

    role: str
    content: str
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None


class SequenceOutput(Wire, frozen=True):
    """What one step added to one sequence. `text` never ends inside a character; it may lag the
    ids while a stop string or a character is undecided. `device_ns` is this sequence's share of
    the step, counted by tokens."""

    request_id: str
    choice: int
    token_ids: list[int]
    text: str
    num_cached_tokens: int
    device_ns: int
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    tool_calls: list[ToolCall] = []  # complete ones; their text is not in `text`
    stop_string: str | None = None  # the one of the request that ended it, where one did
