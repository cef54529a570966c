"""An optimisation's end of a contender: starts it, asks it, and ends it when it is late.

Owns its life and what its failures are called; `contender.py` is the other end.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from runtime.building.contender_messages import (
    LENGTH,
    Answer,
    Answered,
    Done,
    Garbled,
    Hold,
    Load,
    Make,
    Place,
    Question,
    Refused,
    Reply,
    Times,
    Turn,
    body_bytes,
    decode_reply,
    encode,
    outputs_from_wire,
    to_wire,
)
from runtime.protocol import Fate, Schema

logger = logging.getLogger("runtime.build")

# Found by its file, not by name: that takes listing the directory it lies in, and the sandbox lets
# nobody list a checkout on PYTHONPATH.
_START = """
import importlib.util, runpy, sys
found = importlib.util.spec_from_file_location("runtime", sys.argv.pop(1))
runtime = sys.modules["runtime"] = importlib.util.module_from_spec(found)
found.loader.exec_module(runtime)
runpy.run_module("runtime.building.contender", run_name="__main__", alter_sys=True)
"""
_RUNTIME = Path(__file__).resolve().parents[1] / "__init__.py"
COMMAND = (sys.executable, "-P", "-c", _START, str(_RUNTIME))
TICK_SECONDS = 5.0  # between two lines about a question that takes long
END_SECONDS = 10.0  # until an ended process is gone

R = TypeVar("R", Done, Answered, Times)


class ContenderFailure(Exception):
    """The form is out of the contest; `reason` says why in one plain sentence."""

    def __init__(self, fate: Fate, reason: str) -> None:
        super().__init__(reason)
        self.fate: Fate = fate
        self.reason = reason


class ContenderProcess:
    """One process with one form. `until` is when (`time.monotonic`) it has to be done with what
    it is asked; `on_wait` is told every few seconds how long a question has taken. Every method
    but `end` raises `ContenderFailure`."""

    def __init__(
        self,
        place: Place,
        schema: Schema,
        *,
        until: float,
        memory_bytes: int = 0,
        on_wait: Callable[[float], None] = lambda _: None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.until = until
        self.on_wait = on_wait
        self.peak_bytes = 0
        self._place = place
        self._schema = schema
        self._memory_bytes = memory_bytes
        self._connection, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [
                    *(*command, "--connection", str(theirs.fileno())),
                    *("--memory-bytes", str(memory_bytes)),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": str(place.num_threads)},
            )
        finally:
            theirs.close()

    def make(self, max_rows: int, calibration: Sequence[Sequence[torch.Tensor]]) -> None:
        """Have the form's files written."""
        wire = [to_wire(inputs) for inputs in calibration]
        self._ask(Make(place=self._place, max_rows=max_rows, calibration=wire), Done)

    def load(self) -> None:
        """Have the form loaded from its files."""
        self._ask(Load(place=self._place), Done)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The form's outputs."""
        reply = self._ask(Answer(inputs=to_wire(inputs)), Answered)
        try:
            return outputs_from_wire(reply.outputs, self._schema)
        except Garbled as error:
            raise ContenderFailure("differs", f"It gives {error}.") from error

    def hold(self, rows: int, inputs: Sequence[torch.Tensor]) -> float:
        """Keep inputs for timing; about how many milliseconds a run on them takes."""
        return self._ask(Hold(rows=rows, inputs=to_wire(inputs)), Times).runs_ms[0]

    def turn(self, rows: int, seconds: float) -> list[float]:
        """Milliseconds of each run of one turn on what is held."""
        return self._ask(Turn(rows=rows, seconds=seconds), Times).runs_ms

    def end(self) -> None:
        """Hang up: the process and all that it started end. Idempotent."""
        self._connection.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("%s: its process has not ended yet", self._place.form)

    # --- asking -------------------------------------------------------------------------

    def _ask(self, question: Question, kind: type[R]) -> R:
        started = time.monotonic()
        try:
            reply = self._exchange(question, started)
        except TimeoutError:
            self.end()
            seconds = time.monotonic() - started
            raise ContenderFailure(
                "out_of_time", f"It was not done after {seconds:.0f} s and was stopped."
            ) from None
        except (OSError, EOFError):
            self.end()
            raise ContenderFailure("failed", self._explain_end()) from None
        except Garbled as error:
            self.end()
            raise ContenderFailure("failed", "Its process sent what is no answer.") from error
        if isinstance(reply, Refused):
            raise ContenderFailure("failed", reply.reason)
        if not isinstance(reply, kind):
            raise ContenderFailure("failed", "Its process answered what was not asked.")
        self.peak_bytes = max(self.peak_bytes, reply.peak_bytes)
        return reply

    def _exchange(self, question: Question, started: float) -> Reply:
        self._connection.settimeout(self._remaining())
        with suppress(BrokenPipeError):  # it has ended; what it said last comes first
            self._connection.sendall(encode(question))
        prefix = self._receive(LENGTH.size, started)
        return decode_reply(self._receive(body_bytes(prefix), started))

    def _receive(self, num_bytes: int, started: float) -> bytearray:
        data = bytearray()
        while len(data) < num_bytes:
            self._connection.settimeout(min(TICK_SECONDS, self._remaining()))
            try:
                chunk = self._connection.recv(min(num_bytes - len(data), 1024**2))
            except TimeoutError:
                self.on_wait(time.monotonic() - started)
                continue
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def _remaining(self) -> float:
        remaining = self.until - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining

    def _explain_end(self) -> str:
        code = self._process.returncode
        if code is None or code <= 128:
            return f"Its process ended by itself (code {code})."
        name = signal.Signals(code - 128).name
        if code - 128 == signal.SIGKILL:
            return "Its process was killed, most likely because memory ran out."
        return f"Its process crashed ({name})."
