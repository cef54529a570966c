"""What the routes need of one API's way to ask for tokens. Subclasses hold one request each: they
say what its fields mean to a worker and how an answer reads. Running it is `answering.py`'s."""

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import ClassVar, Generic, TypeVar

import msgspec

from app.api.errors import error_body
from app.api.openai_types import PromptTokensDetails, SamplingRequest, Usage
from app.api.sampling import check_stream_options, includes_usage, service_class
from app.core.errors import AppError
from app.metering.records import Tally
from app.organizations.principal import Principal
from runtime.protocol import (
    DecoderInfo,
    FinishReason,
    Generate,
    SequenceOutput,
    ServiceClass,
    TokenLogprob,
)

R = TypeVar("R", bound=SamplingRequest)
Joined = tuple[int, str, list[TokenLogprob] | None, FinishReason | None]


class Dialect(ABC, Generic[R]):
    """Raises `InvalidRequest` from its constructor for what it cannot do. What takes longer the
    longer a request is belongs there: that of a long one is called in a thread."""

    decoder: "ClassVar[msgspec.json.Decoder[R]]"  # type: ignore[misc]
    route: ClassVar[str]
    id_prefix: ClassVar[str]
    end: ClassVar[bytes] = b"data: [DONE]\n\n"  # of a stream that went well
    has_stream_options: ClassVar[bool] = True  # others ignore the field
    names: ClassVar[Mapping[str, str]] = {}  # what this API calls the parameters of the worker's

    def __init__(self, request: R, principal: Principal, request_id: str) -> None:
        self.request = request
        self.principal = principal
        self.request_id = request_id
        self.id = self.id_prefix + request_id.removeprefix("req_")
        self.created = int(time.time())
        self.num_choices = request.n or 1
        self.service_class: ServiceClass = service_class(request)
        self.is_stream = bool(request.stream)
        self.includes_usage = includes_usage(request)
        if self.has_stream_options:
            check_stream_options(request)
        self._offsets: dict[int, int] = defaultdict(int)
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuses what is asked for and not supported, and converts the rest of it."""

    @abstractmethod
    def generate(self, decoder: DecoderInfo, cache_salt: bytes) -> Generate:
        """The worker's form of the request; requests share a prefix cache under equal salts."""

    @abstractmethod
    def answer(self, outputs: list[SequenceOutput], usage: Usage) -> msgspec.Struct:
        """The whole answer at once."""

    @abstractmethod
    def events(self, outputs: list[SequenceOutput]) -> Sequence[msgspec.Struct]:
        """The stream's events for what was added."""

    @abstractmethod
    def closing(self, usage: Usage) -> Sequence[msgspec.Struct]:
        """The stream's last events, once everything is there."""

    def opening(self, usage: Usage) -> Sequence[msgspec.Struct]:
        """The stream's first events; `usage` knows the prompt alone."""
        return ()

    def failure(self, error: AppError) -> msgspec.Struct:
        """The stream's last event where it fails."""
        return error_body(error)

    def renamed(self, error: AppError) -> AppError:
        """The error with this API's name of the parameter that a worker found wrong."""
        name = self.names.get(error.param or "")
        if name is not None:
            error.message = error.message.replace(f"{error.param}:", f"{name}:")
            error.param = name
        return error

    def joined(self, outputs: list[SequenceOutput]) -> list[Joined]:
        """Each choice's whole text, logprobs and finish reason, in order."""
        texts: dict[int, list[str]] = {index: [] for index in range(self.num_choices)}
        logprobs: dict[int, list[TokenLogprob]] = {}
        reasons: dict[int, FinishReason] = {}
        for output in outputs:
            texts[output.choice].append(output.text)
            if output.logprobs is not None:
                logprobs.setdefault(output.choice, []).extend(output.logprobs)
            if output.finish_reason is not None:
                reasons[output.choice] = output.finish_reason
        return [
            (index, "".join(parts), logprobs.get(index), reasons.get(index))
            for index, parts in texts.items()
        ]

    def advance(self, output: SequenceOutput) -> int:
        """How many characters of its choice came before this output."""
        offset = self._offsets[output.choice]
        self._offsets[output.choice] = offset + len(output.text)
        return offset


def usage_of(tally: Tally) -> Usage:
    num_prompt_tokens = tally.admitted.num_prompt_tokens
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=tally.num_output_tokens,
        total_tokens=num_prompt_tokens + tally.num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(tally.num_cached_tokens),
    )
