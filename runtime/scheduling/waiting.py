"""The line of sequences that wait to run, fair between organizations.

Owns the order of admission. Does not own whether there is room (scheduler.py).
"""

import heapq

from runtime.protocol import ServiceClass
from runtime.scheduling.sequence import Sequence, SequenceStatus

# Of a contended device, a class gets tokens in these proportions; none can starve another.
CLASS_WEIGHTS: dict[ServiceClass, int] = {"priority": 16, "standard": 4, "batch": 1}

# A token of an answer takes a step of its own, and keeps its context in the cache meanwhile.
ANSWER_TOKEN_COST = 2  # in tokens of a prompt, as in the paper below

Flow = tuple[str, ServiceClass]


def flow_of(sequence: Sequence) -> Flow:
    return sequence.fairness_key, sequence.service_class


class WaitingLine:
    """First come, first served within a flow (organization and class); between flows, the one
    that was served the least for its weight is next.

    This is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et
    al., OSDI 2024): a flow that returns after a pause starts at the level of the last one served
    and cannot claim the time it was away. Prompts are charged as they are admitted, so that one
    flow cannot take all places of a step at one price. What the cache served is free, and so is
    what a preempted sequence runs again. Preempted sequences come before all others.

    Whatever waits, a call costs the logarithm of it.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Sequence] = {}  # by sequence id
        # Heaps of sequence ids. One that is no longer in `_waiting` was removed, and is skipped.
        self._preempted: list[int] = []
        self._flows: dict[Flow, list[int]] = {}
        self._served: dict[Flow, float] = {}  # weighted tokens
        # A heap of (served, first sequence id, flow) of the flows that wait. What was served
        # meanwhile is looked up as a flow comes to the top.
        self._order: list[tuple[float, int, Flow]] = []
        self._level = 0.0  # `_served` of the flow that was last taken from

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, sequence: Sequence) -> None:
        """Join the line, or return to one's old place in it."""
        self._waiting[sequence.sequence_id] = sequence
        if sequence.status is SequenceStatus.PREEMPTED:
            heapq.heappush(self._preempted, sequence.sequence_id)
            return
        flow = flow_of(sequence)
        if flow not in self._flows:
            self._flows[flow] = []
            self._served[flow] = max(self._served.get(flow, 0.0), self._level)
            heapq.heappush(self._order, (self._served[flow], sequence.sequence_id, flow))
        heapq.heappush(self._flows[flow], sequence.sequence_id)

    def peek(self) -> Sequence | None:
        """Who is next, if anyone waits."""
        while self._preempted:
            if first := self._waiting.get(self._preempted[0]):
                return first
            heapq.heappop(self._preempted)
        while self._order:
            served, _, flow = self._order[0]
            sequence_ids = self._flows[flow]
            while sequence_ids and sequence_ids[0] not in self._waiting:
                heapq.heappop(sequence_ids)
            if not sequence_ids:
                heapq.heappop(self._order)
                del self._flows[flow]
            elif served < self._served[flow]:
                entry = (self._served[flow], sequence_ids[0], flow)
                heapq.heapreplace(self._order, entry)
            else:
                return self._waiting[sequence_ids[0]]
        return None

    def pop(self) -> Sequence:
        """Take out the one that `peek` names."""
        sequence = self.peek()
        assert sequence is not None
        if sequence.status is SequenceStatus.PREEMPTED:
            heapq.heappop(self._preempted)
        else:
            flow = flow_of(sequence)
            heapq.heappop(self._flows[flow])
            self._level = max(self._level, self._served[flow])
        del self._waiting[sequence.sequence_id]
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Leave the line; no-op for one that is not in it."""
        self._waiting.pop(sequence.sequence_id, None)

    def charge_prompt(self, sequence: Sequence) -> None:
        """Count the tokens that an admitted sequence is about to run for the first time."""
        num_paid = max(sequence.num_computed_tokens, sequence.num_charged_tokens)
        self.charge(sequence, len(sequence.token_ids) - num_paid)
        sequence.num_charged_tokens = len(sequence.token_ids)

    def charge_answer(self, sequence: Sequence) -> None:
        """Count the token that was just generated."""
        self.charge(sequence, ANSWER_TOKEN_COST)
        sequence.num_charged_tokens = len(sequence.token_ids)

    def charge(self, sequence: Sequence, cost: int) -> None:
        """Count what the sequence was served, in tokens of a prompt."""
        self._served[flow_of(sequence)] += cost / CLASS_WEIGHTS[sequence.service_class]
