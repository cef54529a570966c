"""Tells the peer of a build how far it is, and keeps how long each phase took."""

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from runtime.protocol import Message, Progress, encode_frame

logger = logging.getLogger("runtime.build")

# Where each phase begins, as a fraction of the whole build, or of the whole optimisation.
PHASE_STARTS = {"unpack": 0.0, "import": 0.15, "prove": 0.4, "measure": 0.8, "package": 0.95}
OPTIMISE_STARTS = {"load": 0.0, "prepare": 0.05, "measure": 0.7, "package": 0.97}


class Reporter:
    """Sends progress as it happens, logs it, and keeps the time of each phase, which may be
    entered again."""

    def __init__(
        self, connection: socket.socket, starts: Mapping[str, float] = PHASE_STARTS
    ) -> None:
        self._connection = connection
        self._starts = starts
        self._fraction = 0.0
        self.phase_seconds: dict[str, float] = {}

    def send(self, message: Message) -> None:
        """A frame to the peer; the watcher ends the process if it has gone."""
        try:
            self._connection.sendall(encode_frame(message))
        except OSError as error:
            logger.info("the control plane is gone: %s", error)

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[float, str], None]]:
        """Yields the phase's own report: a fraction of the phase and a line."""
        starts = [*self._starts.values(), 1.0]
        start = self._starts[name]
        end = min(other for other in starts if other > start)

        def report(fraction: float, detail: str) -> None:
            whole = start + (end - start) * min(1.0, max(0.0, fraction))
            self._fraction = max(self._fraction, whole)
            logger.info("%s: %s", name, detail)
            self.send(Progress(phase=name, fraction=self._fraction, detail=detail))

        started = time.monotonic()
        try:
            yield report
        finally:
            seconds = self.phase_seconds.get(name, 0.0) + time.monotonic() - started
            self.phase_seconds[name] = round(seconds, 3)
