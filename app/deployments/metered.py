"""What the gateway counted of one worker's frames, beside the counters that the worker keeps.

Owns the counts and what they mean; comparing them is billing's. A worker is never billed by its
own counters.
"""

import msgspec

from app.core.clock import monotonic_ns
from app.deployments.generation import Generation
from runtime.protocol import Embedded, Predicted, SequenceOutput


class Counts(msgspec.Struct):
    """Added up since the link was made. A prompt counts once, whatever its number of choices."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    device_ns: int = 0


class Metered:
    """`delivered` went through the journal to whoever asked; `undelivered` came from the worker
    and went nowhere: nobody waited for it any more, or it could not be made durable.

    `num_failed` requests did not end with an answer. What a worker made of those it need not have
    told, so that its own counters may show more.
    """

    def __init__(self) -> None:
        self.delivered = Counts()
        self.undelivered = Counts()
        self.num_failed = 0
        self.started_ns = monotonic_ns()
        self.received_ns = 0  # when the worker last sent something

    def deliver(self, output: SequenceOutput, generation: Generation) -> None:
        """An output that is durable now."""
        _add(self.delivered, output, generation)

    def drop(self, output: SequenceOutput, generation: Generation | None) -> None:
        """An output that nobody gets; without its generation, where that is forgotten."""
        _add(self.undelivered, output, generation)

    def predicted(self, predicted: Predicted) -> None:
        self.delivered.requests += 1
        self.delivered.device_ns += predicted.device_ns

    def embedded(self, embedded: Embedded) -> None:
        """One that was cancelled half-way brings no vectors, and is none of the worker's
        requests."""
        self.delivered.requests += bool(embedded.data)
        self.delivered.prompt_tokens += sum(embedded.num_tokens)
        self.delivered.device_ns += embedded.device_ns

    def fail(self, device_ns: int = 0, *, has_begun: bool) -> None:
        """A request that got no answer, though the worker may have worked for it."""
        self.num_failed += has_begun or device_ns > 0
        self.undelivered.device_ns += device_ns


def _add(counts: Counts, output: SequenceOutput, generation: Generation | None) -> None:
    counts.output_tokens += len(output.token_ids)
    counts.device_ns += output.device_ns
    if generation is None or output.choice != 0 or generation.is_metered:
        return
    assert generation.prepared is not None, "checked when the output came"
    generation.is_metered = True
    counts.requests += 1
    counts.prompt_tokens += generation.prepared.num_prompt_tokens
    counts.cached_tokens += output.num_cached_tokens
