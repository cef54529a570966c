"""What a build makes: a program, how it is loaded, and the receipt of what was tried."""

from typing import Literal

from runtime.protocol.frames import Wire

Kind = Literal["decoder", "embedder", "tensor"]
Batching = Literal["padded", "equal_lengths", "alone"]
Verdict = Literal["equal", "lossy", "different", "unproved"]


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
    # Paged: keys and values are cached in shared blocks. Otherwise every token runs the whole
    # sequence again, and `unpaged_reason` says why in one plain sentence.
    is_paged: bool = True
    unpaged_reason: str = ""
    eos_token_ids: list[int] = []  # end a sequence, beside the tokenizer's own end token
    # The most tokens a chat template adds beyond its messages' own text, per request and per
    # message, measured at build. With one token per byte it bounds what a worker may claim.
    template_tokens: int = 0
    template_tokens_per_message: int = 0
    # Likewise for tools: per request that has any, per call and per result; and the most times
    # it writes each byte of their JSON.
    template_tokens_per_tool_use: int = 0
    template_tool_factor: int = 1
    # Of a vocabulary that is padded in the output layer alone, how many ids have an embedding;
    # 0: all. The others cannot be taken in, and are never generated.
    num_embedded_ids: int = 0

    @property
    def num_ids(self) -> int:
        """Token ids below it may be in a sequence."""
        return self.num_embedded_ids or self.vocab_size


class EmbedderInfo(Wire, frozen=True):
    """What the gateway must know of an embedder to validate, bound and price its requests."""

    architecture: str
    dimensions: int
    vocab_size: int
    max_tokens: int  # of one text; longer ones are refused
    dtype: str
    pooling: str  # how token vectors become one: cls, mean, max, last ..., joined by "+"
    is_normalized: bool  # vectors have length 1
    # The most tokens the tokenizer adds to one text, those of the model's own prompt included.
    special_tokens: int = 0
    has_tokenizer: bool = True
    # Which texts may share a run, as the proof found: of any lengths (padded), of equal lengths,
    # or none (alone).
    batching: Batching = "equal_lengths"
    # The model declares that its vectors may be cut to these many leading numbers, an empty list
    # meaning any; None when it declares nothing.
    matryoshka_dimensions: list[int] | None = None


class Manifest(Wire, frozen=True):
    """`program.json` of a built artifact: what the program is and how to load it."""

    kind: Kind
    format: Literal["huggingface", "pt2"]
    num_parameters: int
    weight_bytes: int
    # The candidate that is served: "eager", "fused", or, of an unpaged decoder whose rows must not
    # share a run, "alone".
    form: str = "eager"
    kernels: str = ""  # the compiled CPU operators that the proof ran on, empty for torch's
    schema: Schema | None = None
    decoder: DecoderInfo | None = None
    embedder: EmbedderInfo | None = None


class Check(Wire, frozen=True):
    """One comparison of the proof. `error` and `tolerance` share a unit, named in `detail`.
    `num_same` of `num_judged` tokens were those of the original; None where none were judged."""

    name: str
    is_equal: bool
    detail: str
    error: float | None = None
    tolerance: float | None = None
    form: str = ""  # what was compared, where several were: "eager, float32"
    num_judged: int | None = None
    num_same: int | None = None
    seconds: float | None = None


class CandidateReport(Wire, frozen=True):
    """One optimised form that was measured, and why it won or lost."""

    name: str
    is_chosen: bool
    reason: str
    p50_ms: dict[int, float] = {}  # batch size -> milliseconds
    prefill_ms: float | None = None  # decoders: one full step of a prompt
    device_ms_max: float = 0.0  # the slowest full batch seen: bounds the hold of a request


class BuildReceipt(Wire, frozen=True):
    """`receipt.json`: what the build tried and found, kept with the version for good. `route`
    says how a decoder's attention was reached, in one plain sentence."""

    verdict: Verdict
    checks: list[Check]
    candidates: list[CandidateReport]
    phase_seconds: dict[str, float]
    torch_version: str
    device: str
    route: str = ""
    notes: list[str] = []
