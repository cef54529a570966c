"""Prepares requests whose grammar must be compiled first, aside from all others.

Owns whose turn it is, and how many may wait. Does not own what is compiled (runtime.engine).
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

NUM_THREADS = 2
MAX_WAITING = 8  # different grammars that one caller may have waiting

Job = Callable[[], None]


class CompileQueue:
    """Takes callers in turns, with one grammar of each under way at most. Requests for the same
    grammar wait together, and only the first compiles it."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="compile")
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[bytes, list[Job]]] = {}  # by caller and grammar
        self._under_way: set[str] = set()
        self._is_closed = False

    def submit(self, caller: str, grammar: bytes, job: Job) -> bool:
        """Run the job in its turn. False when the caller has too many grammars waiting."""
        with self._lock:
            waiting = self._waiting.get(caller, {})
            if grammar not in waiting and len(waiting) >= MAX_WAITING:
                return False
            self._waiting[caller] = waiting
            waiting.setdefault(grammar, []).append(job)
            self._start()
            return True

    def close(self) -> None:
        """Nothing starts from here on."""
        with self._lock:
            self._is_closed = True
            self._waiting.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        """Fill the threads. Whoever gets one goes to the back. Called with the lock held."""
        for caller in list(self._waiting):
            if self._is_closed or len(self._under_way) >= NUM_THREADS:
                return
            if caller in self._under_way:
                continue
            waiting = self._waiting.pop(caller)
            jobs = waiting.pop(next(iter(waiting)))
            if waiting:
                self._waiting[caller] = waiting
            self._under_way.add(caller)
            self._executor.submit(self._run, caller, jobs)

    def _run(self, caller: str, jobs: list[Job]) -> None:
        try:
            for job in jobs:
                job()
        finally:
            with self._lock:
                self._under_way.discard(caller)
                self._start()
