"""One token stream: what the scheduler, the runner and the sampler know of it.

Owns the state of a sequence. Does not own the rules that change it (scheduler.py), nor its text
(runtime.text).
"""

import secrets
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from runtime.protocol import FinishReason, SamplingParams, ServiceClass


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


class BlockKey(NamedTuple):
    """Names the contents of a full block: `digest` covers the salt and every token up to the
    block's end, `parent` up to its beginning; `tokens` are the block's own ids as bytes, so that
    a hit can be compared."""

    parent: bytes
    digest: bytes
    tokens: bytes


@dataclass(frozen=True, slots=True)
class Swapped:
    """A preempted sequence's K/V in host memory: `host_blocks` hold what its blocks from
    `first_block` on held, up to the token `num_tokens`."""

    first_block: int
    host_blocks: list[int]
    num_tokens: int


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """A prompt and what was generated after it. `sequence_id` rises with arrival.

    The K/V of `token_ids[:num_computed_tokens]` is in the cache, in the blocks of `block_table`;
    the rest is still to run. A decoding sequence has exactly one token left to run: the one
    sampled last.
    """

    sequence_id: int
    request_id: str
    token_ids: list[int]  # prompt, then generated
    num_prompt_tokens: int
    max_tokens: int  # to generate, at least 1
    sampling: SamplingParams
    cache_salt: bytes
    choice: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # with the end-of-sequence ids, unless ignored
    service_class: ServiceClass = "standard"
    fairness_key: str = ""
    seed: int = field(default_factory=lambda: secrets.randbits(63))

    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    # Prompt tokens that the cache served when the sequence was first admitted. What a preempted
    # sequence finds again in the cache is not counted: it is our doing, not the caller's.
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list[int])
    block_keys: list[BlockKey] = field(default_factory=list[BlockKey])  # of the full blocks
    num_settled_blocks: int = 0  # of its full blocks, those that were offered to others
    copied_from: int | None = None  # the block whose beginning was copied at admission
    swapped: Swapped | None = None  # while it is preempted
    num_charged_tokens: int = 0  # of its tokens, those that its flow has paid for or found

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append(self, token_id: int) -> FinishReason | None:
        """Append a generated token; the reason to finish, when this token is one."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            return "stop"
        if self.num_generated_tokens >= self.max_tokens:
            return "length"
        return None
