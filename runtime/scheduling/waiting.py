"""The line of sequences that wait to run, fair between organizations.

Owns the order of admission. Does not own whether there is room (scheduler.py).
"""

import heapq

from runtime.protocol import ServiceClass
from runtime.scheduling.sequence import Sequence, SequenceStatus

# Of a contended device, a class gets tokens in these proportions; none can starve another.
CLASS_WEIGHTS: dict[ServiceClass, int] = {"priority": 16, "standard": 4, "batch": 1}

Flow = tuple[str, ServiceClass]


def flow_of(sequence: Sequence) -> Flow:
    return sequence.fairness_key, sequence.service_class


class WaitingLine:
    """First come, first served within a flow (organization and class); between flows, the one
    that was served the fewest tokens for its weight is next.

    This is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et
    al., OSDI 2024): a flow that returns after a pause starts at the level of the last one served
    and cannot claim the time it was away. Preempted sequences come before all others. Looking for
    the next costs the number of flows that wait, not of sequences.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Sequence] = {}  # by sequence id
        # Heaps of sequence ids. One that is no longer in `_waiting` was removed, and is skipped.
        self._preempted: list[int] = []
        self._flows: dict[Flow, list[int]] = {}
        self._served: dict[Flow, float] = {}  # weighted tokens
        self._level = 0.0  # `_served` of the flow that was last taken from

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
        heapq.heappush(self._flows[flow], sequence.sequence_id)

    def peek(self) -> Sequence | None:
        """Who is next, if anyone waits."""
        while self._preempted:
            if first := self._waiting.get(self._preempted[0]):
                return first
            heapq.heappop(self._preempted)
        while self._flows:
            flow = min(self._flows, key=self._served.__getitem__)
            if first := self._waiting.get(self._flows[flow][0]):
                return first
            self._pop_from(flow)
        return None

    def pop(self) -> Sequence:
        """Take out the one that `peek` names."""
        sequence = self.peek()
        assert sequence is not None
        if sequence.status is SequenceStatus.PREEMPTED:
            heapq.heappop(self._preempted)
        else:
            flow = flow_of(sequence)
            self._level = max(self._level, self._served[flow])
            self._pop_from(flow)
        del self._waiting[sequence.sequence_id]
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Leave the line; no-op for one that is not in it."""
        self._waiting.pop(sequence.sequence_id, None)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens that the sequence was served."""
        self._served[flow_of(sequence)] += num_tokens / CLASS_WEIGHTS[sequence.service_class]

    def _pop_from(self, flow: Flow) -> None:
        heapq.heappop(self._flows[flow])
        if not self._flows[flow]:
            del self._flows[flow]
