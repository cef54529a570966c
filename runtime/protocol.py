"""Wire types between the control plane and the processes that run models.

Owns the message structs and their framing; imports nothing else of the project, so that
`app` can use it without torch. Does not own what the messages mean: see `server/` (a
worker's side) and `app/deployments/link.py` (the gateway's side).

A frame is a 4-byte little-endian length and that many bytes of msgpack. Either side closes
the stream on a frame that is too long or does not match its schema: a worker runs someone
else's model, so nothing it sends is trusted to be well formed.
"""

import struct
from typing import Literal

import msgspec

MAX_FRAME_BYTES = 64 * 1024 * 1024
LENGTH = struct.Struct("<I")

Kind = Literal["decoder", "embedder", "tensor"]
Verdict = Literal["equal", "lossy", "different", "unproved"]
FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]
ServiceClass = Literal["priority", "standard", "batch"]


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value inside a message."""


class Message(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag=str.lower,
):
    """One frame. Its `type` is the class name in lower case."""


# --- values -----------------------------------------------------------------------------


class WireError(Wire, frozen=True):
    """A failure a caller can be told about. `status` is the HTTP status it becomes."""

    type: str
    message: str
    code: str
    param: str | None = None
    status: int = 400


class Tensor(Wire, frozen=True):
    """`data` is C-ordered, little-endian; `dtype` is numpy's name (`float32`, `int64`, `bool`)."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


class TensorSpec(Wire, frozen=True):
    """One input or output of a tensor program. `None` in `shape` is a dynamic axis."""

    name: str
    dtype: str
    shape: list[int | None]
    min_shape: list[int] | None = None
    max_shape: list[int | None] | None = None


class Schema(Wire, frozen=True):
    """What a tensor program takes and gives. `is_batched`: axis 0 of all of them is one dynamic
    batch axis, so rows of different requests may share a run."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    is_batched: bool


class DecoderInfo(Wire, frozen=True):
    """What the gateway must know of a decoder to validate, bound and price its requests."""

    architecture: str
    vocab_size: int
    max_context_tokens: int
    num_layers: int
    kv_bytes_per_token: int
    dtype: str
    has_tokenizer: bool
    has_chat_template: bool
    # The most tokens a chat template adds beyond its messages' own text, per request and per
    # message, measured at build. With one token per byte it bounds what a worker may claim.
    template_tokens: int = 0
    template_tokens_per_message: int = 0


class Manifest(Wire, frozen=True):
    """`program.json` of a built artifact: what the program is and how to load it."""

    kind: Kind
    format: Literal["huggingface", "pt2"]
    num_parameters: int
    weight_bytes: int
    schema: Schema | None = None
    decoder: DecoderInfo | None = None


class Check(Wire, frozen=True):
    """One comparison of the proof. `error` and `tolerance` share a unit, named in `detail`."""

    name: str
    is_equal: bool
    detail: str
    error: float | None = None
    tolerance: float | None = None


class CandidateReport(Wire, frozen=True):
    """One optimised form that was measured, and why it won or lost."""

    name: str
    is_chosen: bool
    reason: str
    p50_ms: dict[int, float] = {}  # batch size -> milliseconds
    device_ms_max: float = 0.0  # the slowest full batch seen: bounds the hold of a request


class BuildReceipt(Wire, frozen=True):
    """`receipt.json`: what the build tried and found, kept with the version for good."""

    verdict: Verdict
    checks: list[Check]
    candidates: list[CandidateReport]
    phase_seconds: dict[str, float]
    torch_version: str
    device: str
    notes: list[str] = []


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


class ChatMessage(Wire, frozen=True):
    """One message of a chat, its content already flattened to text."""

    role: str
    content: str
    name: str | None = None


# --- to a build -------------------------------------------------------------------------


class Build(Message, frozen=True):
    """Start the build that this process was made for. Paths are as this process sees them."""

    upload_path: str
    output_dir: str
    num_threads: int = 2


# --- from a build -----------------------------------------------------------------------


class Progress(Message, frozen=True):
    """`fraction` is of the whole build, 0 to 1, and never falls."""

    phase: str
    fraction: float
    detail: str = ""


class Built(Message, frozen=True):
    manifest: Manifest
    receipt: BuildReceipt


class BuildFailed(Message, frozen=True):
    """`error.message` says in plain words what is wrong and what to do about it."""

    error: WireError


# --- to a worker ------------------------------------------------------------------------


class Serve(Message, frozen=True):
    """First frame to a worker: how to serve the artifact it was started with."""

    artifact_dir: str
    device: str = "cpu"
    num_threads: int = 2
    kv_cache_bytes: int = 256 * 1024 * 1024
    block_size: int = 32  # tokens
    max_batch_tokens: int = 1024  # token budget of one step
    max_sequences: int = 64  # running at once
    max_waiting: int = 1024  # requests prepared or queued before 429
    max_batch_rows: int = 64  # tensor programs: rows of one run
    max_wait_ms: float = 2.0  # tensor programs: how long a row waits for company


class Generate(Message, frozen=True):
    """Tokenise and validate; the worker answers `Prepared` or `Failed` and then waits for `Start`.

    Exactly one of `text`, `token_ids` and `messages` is set. `cache_salt` scopes the prefix
    cache: requests share cached blocks only under equal salts.
    """

    request_id: str
    sampling: SamplingParams
    cache_salt: bytes
    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[ChatMessage] | None = None
    num_choices: int = 1  # OpenAI's `n`: sequences that share the prompt
    echo: bool = False
    service_class: ServiceClass = "standard"
    fairness_key: str = ""  # queueing is fair between these (the organization)


class Start(Message, frozen=True):
    """The gateway holds the money: run the prepared request."""

    request_id: str


class Cancel(Message, frozen=True):
    """Stop as soon as possible; idempotent. A running request answers with `abort` outputs."""

    request_id: str


class Predict(Message, frozen=True):
    """Run a tensor program; answered by `Predicted` or `Failed`. Needs no `Start`: its worst cost
    is known from the manifest before it is sent."""

    request_id: str
    inputs: list[Tensor]


class Drain(Message, frozen=True):
    """Refuse new requests, finish running ones, then close the stream and exit."""


# --- from a worker ----------------------------------------------------------------------


class Ready(Message, frozen=True):
    """The program is loaded and answers. `memory_bytes` is what the process holds now."""

    manifest: Manifest
    memory_bytes: int
    attention: str = ""  # backend in use: reference, cpu-avx2, cpu-avx512, triton
    num_blocks: int = 0
    block_size: int = 0


class Prepared(Message, frozen=True):
    """`max_tokens` is what the request may generate per choice: its own limit or what is left of
    the context, whichever is less."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int


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


class Step(Message, frozen=True):
    """Everything one engine step produced, in one frame."""

    outputs: list[SequenceOutput]


class Predicted(Message, frozen=True):
    """`device_ns` is this request's share (by rows) of the run it was part of."""

    request_id: str
    outputs: list[Tensor]
    device_ns: int
    batch_rows: int
    queue_ns: int


class Failed(Message, frozen=True):
    """This request failed, or was refused; its neighbours are unaffected."""

    request_id: str
    error: WireError


class Stats(Message, frozen=True):
    """Counters since start, and the cache now; sent once a second while anything changes. The
    gateway compares them with what it metered; it never bills from them."""

    num_running: int = 0
    num_waiting: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    used_blocks: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0
    rows: int = 0
    runs: int = 0
    device_ns: int = 0


class Fatal(Message, frozen=True):
    """The process cannot go on (the artifact does not load, the device is lost) and exits."""

    error: WireError


ToBuild = Build
FromBuild = Progress | Built | BuildFailed
ToWorker = Serve | Generate | Start | Cancel | Predict | Drain
FromWorker = Ready | Prepared | Step | Predicted | Failed | Stats | Fatal

_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: Message) -> bytes:
    """Raises `ValueError` when the message would not fit a frame."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


class FrameError(Exception):
    """The peer sent something that is not a valid frame; the stream is unusable."""


def check_frame_length(prefix: bytes) -> int:
    """The body length that a 4-byte prefix announces. Raises `FrameError` when out of bounds."""
    (length,) = LENGTH.unpack(prefix)
    if not 0 < length <= MAX_FRAME_BYTES:
        raise FrameError(f"frame of {length} bytes; at most {MAX_FRAME_BYTES}")
    return length
