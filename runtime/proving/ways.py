"""The ways in which serving can run a sequence, each replayed on the traces of a proof.

Owns how tokens are cut, mixed, shared and taken away. What the logits must be is
`decoder.py`'s to judge.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.execution.whole import WholeModel
from runtime.proving.original import Trace
from runtime.proving.replay import Replay

# A form's logits, the original's for the same tokens, both [tokens, vocab], and the numbers of
# these rows [tokens]: see `Trace`.
Found = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Way:
    """One way to run the traces of a paged decoder; `description` completes "Compared: ..."."""

    name: str
    description: str
    # Logits of each trace `[rows, vocab]`: of all its tokens, or of the last ones alone.
    run: Callable[[Replay, list[Trace]], list[Tensor]]


@dataclass(frozen=True)
class WholeWay:
    """One way to run the traces of a decoder that keeps no cache."""

    name: str
    description: str
    run: Callable[[WholeModel, list[Trace]], list[Found]]


# --- paged ------------------------------------------------------------------------------


def _run_alone(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    found = []
    for i, trace in enumerate(traces):
        name = f"sequence {i}"
        steps = [trace.tokens[: trace.num_prompt], *([t] for t in trace.tokens[trace.num_prompt :])]
        found.append(torch.cat([replay.step({name: step})[name] for step in steps]))
        replay.release(name)
    return found


def _run_chunked(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    chunk = replay.block_size // 2 + 1
    found = []
    for i, trace in enumerate(traces):
        name = f"sequence {i}"
        starts = range(0, len(trace.tokens), chunk)
        pieces = [replay.step({name: trace.tokens[at : at + chunk]})[name] for at in starts]
        found.append(torch.cat(pieces))
        replay.release(name)
    return found


def _run_batched(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    """Prefill of one beside decoding of others; what ends is freed and poisoned meanwhile."""
    found: list[list[Tensor]] = [[] for _ in traces]
    num_done = [0] * len(traces)
    num_started = 0
    while any(done < len(trace.tokens) for done, trace in zip(num_done, traces, strict=True)):
        num_started = min(num_started + 1, len(traces))
        work: dict[str, list[int]] = {}
        for i, trace in enumerate(traces[:num_started]):
            end = max(trace.num_prompt, num_done[i] + 1)
            if tokens := trace.tokens[num_done[i] : end]:
                work[str(i)] = tokens
        for name, logits in replay.step(work).items():
            i = int(name)
            found[i].append(logits)
            num_done[i] += len(logits)
            if num_done[i] == len(traces[i].tokens):
                replay.release(name)
    return [torch.cat(pieces) for pieces in found]


def _run_sampled(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    """As `_run_batched`, but only the rows that serving samples are asked for: a prompt's last
    and each generated token's, in one step."""
    found: list[list[Tensor]] = [[] for _ in traces]
    num_done = [0] * len(traces)
    for at in range(len(traces) + max(len(t.tokens) - t.num_prompt for t in traces)):
        work: dict[str, list[int]] = {}
        for i, trace in enumerate(traces[: at + 1]):
            end = max(trace.num_prompt, num_done[i] + 1)
            if tokens := trace.tokens[num_done[i] : end]:
                work[str(i)] = tokens
                num_done[i] = end
        if not work:
            break
        for name, logits in replay.step(work, is_last_only=True).items():
            found[int(name)].append(logits)
    for i in range(len(traces)):
        replay.release(str(i))
    return [torch.cat(pieces) for pieces in found]


def _run_on_prefix(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    """Each trace once to fill its blocks, then again on those of its blocks that are full."""
    found = []
    for i, trace in enumerate(traces):
        first, second = f"first {i}", f"second {i}"
        logits = replay.step({first: trace.tokens[:-1]})[first]
        num_shared = len(trace.tokens[:-1]) // replay.block_size * replay.block_size
        replay.share(first, second, num_shared)
        rest = replay.step({second: trace.tokens[num_shared:]})[second]
        replay.release(first)
        replay.release(second)
        found.append(torch.cat([logits[:num_shared], rest]))
    return found


def _run_on_partial(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    """As `_run_on_prefix`, but the last block is shared half full and copied, and its first owner
    goes on writing other tokens into its own while the copy is read."""
    found = []
    for i, trace in enumerate(traces):
        first, second = f"first {i}", f"second {i}"
        num_shared = len(trace.tokens) - 2
        if num_shared % replay.block_size == 0:
            num_shared -= 1
        if num_shared < 1:
            found.append(replay.step({second: trace.tokens})[second])
            replay.release(second)
            continue
        logits = replay.step({first: trace.tokens[:num_shared]})[first]
        replay.share(first, second, num_shared)
        other = [(token + 1) % trace.reference.shape[1] for token in trace.tokens[num_shared:]]
        pieces = [
            replay.step({second: [token], first: [wrong]})[second]
            for token, wrong in zip(trace.tokens[num_shared:], other, strict=True)
        ]
        replay.release(first)
        replay.release(second)
        found.append(torch.cat([logits, *pieces]))
    return found


def _run_preempted(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    """Half way through generation every sequence loses its blocks and is computed again."""

    def preempt(names: Sequence[str], done: Sequence[list[int]]) -> None:
        for name in names:
            replay.release(name)
        replay.step(dict(zip(names, done, strict=True)))

    return _run_interrupted(replay, traces, preempt)


def _run_swapped(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    """Half way through generation every sequence's blocks go to host memory and come back to
    other places, after what is not its own has been there."""

    def preempt(names: Sequence[str], _: Sequence[list[int]]) -> None:
        for name in names:
            replay.swap_out(name)
        replay.step({"stranger": [0] * replay.block_size})
        for name in reversed(names):
            replay.swap_in(name)
        replay.release("stranger")

    return _run_interrupted(replay, traces, preempt)


def _run_interrupted(
    replay: Replay,
    traces: list[Trace],
    preempt: Callable[[Sequence[str], Sequence[list[int]]], None],
) -> list[Tensor]:
    """All traces together, `preempt`ed (names, tokens done) in the middle of generation."""
    names = [str(i) for i in range(len(traces))]
    num_new = len(traces[0].tokens) - traces[0].num_prompt
    prompts = {name: t.tokens[: t.num_prompt] for name, t in zip(names, traces, strict=True)}
    found = [[logits] for logits in replay.step(prompts).values()]
    for at in range(num_new):
        if at == num_new // 2:
            preempt(names, [trace.tokens[: trace.num_prompt + at] for trace in traces])
        work = {
            name: [trace.tokens[trace.num_prompt + at]]
            for name, trace in zip(names, traces, strict=True)
        }
        for pieces, logits in zip(found, replay.step(work).values(), strict=True):
            pieces.append(logits)
    for name in names:
        replay.release(name)
    return [torch.cat(pieces) for pieces in found]


PAGED_WAYS = (
    Way("paged", "the prompt at once, then token by token, on cached blocks", _run_alone),
    Way("chunked", "prompts in pieces that end inside blocks", _run_chunked),
    Way("batched", "all prompts together, each a step later than the last", _run_batched),
    Way("sampled", "prompts beside decoding, only each one's last token asked for", _run_sampled),
    Way("prefix", "on full blocks that another sequence computed", _run_on_prefix),
    Way("partial", "on a half-full block of another sequence, by copy", _run_on_partial),
    Way("preempted", "blocks taken away while generating, and computed again", _run_preempted),
    Way("swapped", "blocks moved to host memory while generating, and back", _run_swapped),
)


# --- without a cache --------------------------------------------------------------------


def _run_whole(model: WholeModel, traces: list[Trace]) -> list[Found]:
    """The last token of the prompt, and of each sequence one token longer."""
    return [
        (
            model.logits(torch.tensor([trace.tokens[:end]])),
            trace.reference[end - 1 : end],
            torch.tensor([trace.first_row + end - 1]),
        )
        for trace in traces
        for end in trace.ends
        if end >= trace.num_prompt
    ]


def _run_whole_batched(model: WholeModel, traces: list[Trace]) -> list[Found]:
    """Sequences of equal length side by side: all traces, cut to the length of each in turn."""
    found: list[Found] = []
    for end in sorted({len(trace.tokens) for trace in traces}):
        long_enough = [trace for trace in traces if len(trace.tokens) >= end]
        # One alone is doubled, with its neighbour's tokens in reverse.
        rows = [trace.tokens[:end] for trace in long_enough]
        rows += [rows[0][::-1]] if len(rows) == 1 else []
        logits = model.logits(torch.tensor(rows))
        reference = torch.stack([trace.reference[end - 1] for trace in long_enough])
        numbers = torch.tensor([trace.first_row + end - 1 for trace in long_enough])
        found.append((logits[: len(long_enough)], reference, numbers))
    return found


WHOLE_WAYS = (
    WholeWay("whole", "every token from the whole sequence, without a cache", _run_whole),
    WholeWay("batched", "sequences of equal length side by side", _run_whole_batched),
)
