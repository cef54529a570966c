"""The messages: one frame each, to and from builds and workers."""

from runtime.protocol.frames import Message, WireError
from runtime.protocol.programs import BuildHints, BuildReceipt, Manifest
from runtime.protocol.requests import (
    ChatMessage,
    SamplingParams,
    SequenceOutput,
    ServiceClass,
    Tensor,
    Tool,
)

# --- to a build --------------------------------------------------------------------------


class Build(Message, frozen=True):
    """Start the build that this process was made for. Paths are as this process sees them."""

    upload_path: str
    output_dir: str
    num_threads: int = 2
    hints: BuildHints = BuildHints()


class Optimise(Message, frozen=True):
    """Look for a faster form of a tensor program that was built: answered by `Progress` and then
    `Optimised` or `BuildFailed`. `output_dir` becomes a whole artifact, like that of a build."""

    artifact_dir: str
    output_dir: str
    device: str = "cpu"
    num_threads: int = 2
    budget_seconds: float = 900.0  # candidates not finished by then are left out
    memory_bytes: int = 0  # that this process and its children may take; 0: what is free
    accepts_loss: bool = False


# --- from a build ------------------------------------------------------------------------


class Progress(Message, frozen=True):
    """`fraction` is of the whole build, 0 to 1, and never falls."""

    phase: str
    fraction: float
    detail: str = ""


class Built(Message, frozen=True):
    manifest: Manifest
    receipt: BuildReceipt


class Optimised(Message, frozen=True):
    """`manifest.form` is the winner, eager perhaps; `receipt` the build's with the candidates."""

    manifest: Manifest
    receipt: BuildReceipt


class BuildFailed(Message, frozen=True):
    """`error.message` says in plain words what is wrong and what to do about it."""

    error: WireError


# --- to a worker -------------------------------------------------------------------------


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
    swap_bytes: int = 0  # host memory for the blocks of preempted sequences; 0 recomputes them
    poisons_blocks: bool = False  # debug: blocks given back are filled with NaN
    max_batch_rows: int = 128  # tensor programs: rows of one run
    # Tensor programs: how long a request may take in the worker. A row waits for company only
    # within it, and only while measured service times say that this pays. 0: never waits.
    latency_target_ms: float = 100.0


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
    # The answer must be JSON that this schema (as text) allows; "{}" allows any object's JSON.
    json_schema: str | None = None
    tools: list[Tool] = []  # with `messages` only
    tool_choice: str = "auto"  # none, auto, required, or "function:" and the name of one tool
    allows_several_calls: bool = True  # of tools in one answer
    service_class: ServiceClass = "standard"
    fairness_key: str = ""  # queueing is fair between these (the organization)
    # Never started: the prompt's length is asked alone, which may be more than the context's.
    is_count: bool = False


class Start(Message, frozen=True):
    """The gateway holds the money: run the prepared request."""

    request_id: str


class Cancel(Message, frozen=True):
    """Stop as soon as possible; idempotent. A running request answers with `abort` outputs."""

    request_id: str


class Predict(Message, frozen=True):
    """Run a tensor program; answered by `Predicted` or `Failed`. Needs no `Start`: its worst cost
    is known from the manifest before it is sent. Exactly one of `inputs`, `texts` (rows of one
    text, or of two) and `image` (the bytes of a PNG or JPEG, one row) is set."""

    request_id: str
    inputs: list[Tensor] | None = None
    texts: list[list[str]] | None = None
    image: bytes | None = None
    fairness_key: str = ""


class Embed(Message, frozen=True):
    """Tokenise and validate; answered by `Prepared` (whose `num_prompt_tokens` counts all texts)
    or `Failed`; after `Start`, by `Embedded`. Exactly one of `texts` and `token_ids` is set."""

    request_id: str
    texts: list[str] | None = None
    token_ids: list[list[int]] | None = None
    fairness_key: str = ""


class Drain(Message, frozen=True):
    """Refuse new requests, finish running ones, then close the stream and exit."""


# --- from a worker -----------------------------------------------------------------------


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


class Step(Message, frozen=True):
    """Everything one engine step produced, in one frame."""

    outputs: list[SequenceOutput]


class Predicted(Message, frozen=True):
    """`device_ns` is this request's share (by the values of its rows) of the runs it was part
    of."""

    request_id: str
    outputs: list[Tensor]
    device_ns: int
    batch_rows: int
    queue_ns: int


class Embedded(Message, frozen=True):
    """`data` is float32, little-endian, one row of `dimensions` per text. `device_ns` is this
    request's share (by tokens) of the runs it was part of. Of a request that was cancelled after
    some of its texts ran, `data` is empty and `num_tokens` counts those alone."""

    request_id: str
    dimensions: int
    data: bytes
    num_tokens: list[int]  # per text
    device_ns: int


class Failed(Message, frozen=True):
    """This request failed, or was refused; its neighbours are unaffected. `device_ns` is what a
    prediction ran for before it did, which its caller pays where the failure is of their making."""

    request_id: str
    error: WireError
    device_ns: int = 0


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
    preemptions: int = 0
    swapped_blocks: int = 0
    rows: int = 0
    runs: int = 0
    device_ns: int = 0
    queue_ns: int = 0  # tensor programs: that answered requests spent outside of runs
    runs_by_rows: dict[int, int] = {}  # likewise: runs by their rows, up to a power of two


class Fatal(Message, frozen=True):
    """The process cannot go on (the artifact does not load, the device is lost) and exits."""

    error: WireError


ToBuild = Build | Optimise
FromBuild = Progress | Built | Optimised | BuildFailed
ToWorker = Serve | Generate | Embed | Start | Cancel | Predict | Drain
FromWorker = Ready | Prepared | Step | Predicted | Embedded | Failed | Stats | Fatal
