"""What a build makes: a program, how it is loaded, and the receipt of what was tried."""

import math
from typing import Literal

from runtime.protocol.frames import Wire

Kind = Literal["decoder", "embedder", "tensor"]
Batching = Literal["padded", "equal_lengths", "alone"]
Verdict = Literal["equal", "lossy", "different", "unproved"]
Format = Literal["huggingface", "pt2", "onnx", "torchscript"]
# What became of a candidate: chosen; slower than the chosen one; within the margin, so that eager
# stays; gives other answers than it may; may lose accuracy, which the owner has not allowed;
# cannot be had on this box; failed; or was not finished in the time there was.
Fate = Literal[
    "chosen", "slower", "within_margin", "differs", "lossy", "unavailable", "failed", "out_of_time"
]


class ImageInput(Wire, frozen=True):
    """How an encoded image (PNG or JPEG) becomes one row of an input: resized, its bytes times
    `scale`, less `mean`, divided by `std` (per channel; empty: left out). Integer inputs take the
    bytes as they are."""

    height: int
    width: int
    channels: int  # 1: grey, 3: red, green, blue
    is_channels_first: bool
    scale: float = 1 / 255
    mean: list[float] = []
    std: list[float] = []
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    # The shorter side is resized to it and the middle cut out; 0: the whole image is stretched.
    shortest_edge: int = 0


class TensorSpec(Wire, frozen=True):
    """One input or output of a tensor program. `None` in `shape` is a dynamic axis."""

    name: str
    dtype: str
    shape: list[int | None]
    min_shape: list[int] | None = None
    max_shape: list[int | None] | None = None
    # Of an input: the least and greatest value that the model is known to take.
    minimum: float | None = None
    maximum: float | None = None
    # The axis along which rows of different lengths share a run: inputs are padded there with
    # `pad_value`, outputs cut back. None: the proof has not found that harmless.
    padded_axis: int | None = None
    pad_value: float = 0.0
    # Of a padded input: the longest that padding was proved at; longer rows are not padded, nor is
    # any row to more. None: any length.
    longest_padded: int | None = None
    image: ImageInput | None = None  # of an input that takes encoded images too

    def least_shape(self, num_rows: int | None, length: int) -> list[int]:
        """Of an output: its sizes for so many rows (None: not batched), whose inputs have `length`
        along the padded axis; each axis that these do not tell has its least size."""
        sizes: list[int] = []
        for axis, size in enumerate(self.shape):
            least = 0 if self.min_shape is None else self.min_shape[axis]
            if axis == 0 and num_rows is not None:
                least = num_rows
            elif axis == self.padded_axis:
                least = length
            sizes.append(least if size is None else size)
        return sizes


class Schema(Wire, frozen=True):
    """What a tensor program takes and gives. `is_batched`: axis 0 of all of them is one dynamic
    batch axis, so rows of different requests may share a run."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    is_batched: bool

    def row_size(self, shapes: list[list[int]]) -> int:
        """How large a row of inputs of these shapes is in what may vary: the product of its
        dynamic axes, over all inputs that have any; 0 where none has. Unbatched, all is a row."""
        total = 0
        for spec, shape in zip(self.inputs, shapes, strict=True):
            axes = list(zip(spec.shape, shape, strict=True))[1 if self.is_batched else 0 :]
            sizes = [size for fixed, size in axes if fixed is None]
            total += math.prod(sizes) if sizes else 0
        return total


class TextInput(Wire, frozen=True):
    """How texts become the inputs of a tensor program: its tokenizer lies in the artifact."""

    max_tokens: int
    takes_pairs: bool  # a row may be two texts, as a ranking model's are
    token_ids: str  # the inputs' names; empty where the program has none
    attention_mask: str = ""
    token_type_ids: str = ""


class InputHint(Wire, frozen=True):
    """What an owner says of one input of a file that does not. An axis is a size, or the name of
    a dynamic one; axes of one name have one size, and `batch` is the rows of a request."""

    name: str
    dtype: str
    axes: list[int | str]
    minimum: float | None = None
    maximum: float | None = None
    # Of named axes: the least and greatest size, None for any.
    bounds: dict[str, tuple[int, int | None]] = {}

    @property
    def text(self) -> str:
        """As its owner would write it: `ids: int64[batch, 2<=tokens<=512] in 0..30521`."""
        axes = ", ".join(_show_axis(axis, self.bounds) for axis in self.axes)
        values = ""
        if self.minimum is not None and self.maximum is not None:
            values = f" in {_show_number(self.minimum)}..{_show_number(self.maximum)}"
        return f"{self.name}: {self.dtype}[{axes}]{values}"


def _show_axis(axis: int | str, bounds: dict[str, tuple[int, int | None]]) -> str:
    least, most = bounds.get(str(axis), (1, None))
    before = f"{least}<=" if least > 1 else ""
    after = f"<={most}" if most is not None else ""
    return f"{before}{axis}{after}"


def _show_number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)


class BuildHints(Wire, frozen=True):
    """What an owner says of an upload, beyond the file. `accepts_loss`: candidates that change
    the answers measurably (int8) may win."""

    inputs: list[InputHint] = []
    accepts_loss: bool = False
    # `inputs` were said of an earlier version: where they do not fit, they are left aside.
    is_remembered: bool = False


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
    format: Format
    num_parameters: int
    weight_bytes: int
    # The candidate that is served: "eager", a decoder's "fused", or, of an unpaged decoder whose
    # rows must not share a run, "alone"; of tensor programs, one of `compiling.forms`.
    form: str = "eager"
    # Where a compiled form holds: versions, CPU or GPU, threads. Elsewhere eager serves.
    environment: str = ""
    kernels: str = ""  # the compiled CPU operators that the proof ran on, empty for torch's
    schema: Schema | None = None
    text: TextInput | None = None  # tensor programs that take texts too
    labels: list[str] = []  # names of the last axis of a classifier's first output
    are_labels_independent: bool = False  # any number of them may hold: a sigmoid each, no softmax
    accepts_loss: bool = False  # as the owner said
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
    """One optimised form that was measured, and why it won or lost. What was not measured is
    empty."""

    name: str
    is_chosen: bool
    reason: str
    fate: Fate | None = None
    precision: str = ""  # of its arithmetic: float32, bfloat16 ...
    p50_ms: dict[int, float] = {}  # batch size -> milliseconds
    p99_ms: dict[int, float] = {}
    num_runs: int = 0  # timed, at each batch size
    rows_per_second: dict[int, float] = {}
    memory_bytes: int | None = None  # that its process held at most while it ran
    # The largest deviation from the program as uploaded, in multiples of what is allowed.
    error: float | None = None
    top_1_agreement: float | None = None  # share of rows with the same largest value, of lossy ones
    prepare_seconds: float | None = None  # that making it took
    prefill_ms: float | None = None  # decoders: one full step of a prompt
    device_ms_max: float = 0.0  # the slowest full batch seen: bounds the hold of a request
    # Tensor programs with dynamic axes besides the rows: the slowest run of one row, by
    # `Schema.row_size`. The smallest is that of the runs by rows.
    row_ms_by_size: dict[int, float] = {}


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
    # What looks wrong with the model though it can be served: its owner should see to it.
    warnings: list[str] = []
    environment: str = ""  # what the candidates were measured on, in one line
