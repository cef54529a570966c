"""A seeded discrete-event simulation of one model's server under several shapes of load."""

import heapq
import random
from collections.abc import Callable
from itertools import count

import msgspec

from runtime.batching.fair_queue import BatchQueue, Pending, Slice
from runtime.batching.planner import Planner

Truth = Callable[[int], float]  # rows to milliseconds of a run


class FixedWait:
    """The policy of most servers: the first to come waits for others, so long or until full."""

    def __init__(self, max_rows: int, wait_ms: float) -> None:
        self.queue: BatchQueue[int] = BatchQueue(max_rows)
        self._max_rows = max_rows
        self._wait_ms = wait_ms
        self._is_running = False
        self.due_ms: float | None = None

    def add(self, pending: Pending[int], now_ms: float) -> None:
        pending.came_ms = now_ms
        self.queue.add(pending)

    def next(self, now_ms: float) -> list[Slice[int]]:
        head = self.queue.head()
        self.due_ms = None
        if head is None or self._is_running:
            return []
        due_ms = head.came_ms + self._wait_ms
        if now_ms < due_ms and self.queue.num_rows(head, self._max_rows) < self._max_rows:
            self.due_ms = due_ms
            return []
        self._is_running = True
        return self.queue.take(self._max_rows)

    def ended(self, slices: list[Slice[int]], now_ms: float, run_ms: float, size: int) -> None:
        self._is_running = False


class Result(msgspec.Struct):
    latencies: list[float]
    sizes: list[int]  # of runs
    seconds: float

    @property
    def mean_ms(self) -> float:
        return sum(self.latencies) / len(self.latencies)

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds


class Simulation:
    """`policy` under requests that the load puts in with `request`; `answered` calls it back."""

    def __init__(self, policy: Planner[int] | FixedWait, truth: Truth, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - of the load
        self._hiccups = random.Random(seed)  # noqa: S311
        self.now_ms = 0.0
        self._policy = policy
        self._truth = truth
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._orders = count()
        self._latencies: list[float] = []
        self._sizes: list[int] = []
        self._callbacks: dict[int, Callable[[], None]] = {}

    def at(self, time_ms: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_ms, next(self._orders), action))

    def request(self, rows: int = 1, answered: Callable[[], None] = lambda: None) -> None:
        number = next(self._orders)
        self._callbacks[number] = answered
        self._policy.add(Pending(number, "", "", rows), self.now_ms)
        self._wake()

    def run(self, until_ms: float) -> Result:
        while self._events and self._events[0][0] <= until_ms:
            self.now_ms, _, action = heapq.heappop(self._events)
            action()
        return Result(self._latencies, self._sizes, until_ms / 1e3)

    def _wake(self) -> None:
        slices = self._policy.next(self.now_ms)
        if slices:
            rows = sum(each.stop - each.start for each in slices)
            self._sizes.append(rows)
            run_ms = self._truth(rows) * self._hiccups.lognormvariate(0, 0.1)
            self.at(self.now_ms + run_ms, lambda: self._end(slices, run_ms))
        elif self._policy.due_ms is not None:
            self.at(self._policy.due_ms, self._wake)

    def _end(self, slices: list[Slice[int]], run_ms: float) -> None:
        self._policy.ended(slices, self.now_ms, run_ms, 1)
        for each in slices:
            if not each.pending.rows:
                self._latencies.append(self.now_ms - each.pending.came_ms)
                self._callbacks.pop(each.pending.item)()
        self._wake()


# --- loads ------------------------------------------------------------------------------

Load = Callable[[Simulation], None]


def poisson(per_second: float) -> Load:
    """Independent callers."""

    def start(simulation: Simulation) -> None:
        def come() -> None:
            simulation.request()
            simulation.at(simulation.now_ms + simulation.random.expovariate(per_second / 1e3), come)

        simulation.at(0, come)

    return start


def closed(num_callers: int, think_ms: float, spread: float = 0.3) -> Load:
    """Callers that send the next request when they have an answer, after a gateway's time that
    grows with how many come back at once."""

    def start(simulation: Simulation) -> None:
        free_at = [0.0]

        def come() -> None:
            simulation.request(answered=answered)

        def answered() -> None:
            think = think_ms * simulation.random.lognormvariate(0, spread)
            free_at[0] = max(free_at[0], simulation.now_ms) + 0.05
            simulation.at(free_at[0] + think, come)

        for number in range(num_callers):
            simulation.at(number * 0.37, come)

    return start


def bursts(size: int, every_ms: float, gap_ms: float = 0.1) -> Load:
    """Parallel calls, one shortly after the other, now and then."""

    def start(simulation: Simulation) -> None:
        def burst() -> None:
            for number in range(size):
                simulation.at(simulation.now_ms + number * gap_ms, simulation.request)
            pause = every_ms * simulation.random.uniform(0.7, 1.3)
            simulation.at(simulation.now_ms + pause, burst)

        simulation.at(0, burst)

    return start


def both(*loads: Load) -> Load:
    def start(simulation: Simulation) -> None:
        for load in loads:
            load(simulation)

    return start
