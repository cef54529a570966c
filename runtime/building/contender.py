"""One form of a program in a process of its own: makes it or loads it, runs it, times it.

Two processes, in fact. The one that is started stays small and guards the other: it ends it,
and every compiler that it started, as soon as the optimisation's end of the stream is gone, for
whatever reason. The other does what it is asked, and may crash, hang or take too much memory.

Nothing heavy is imported before the fork, hence the imports inside functions.
"""

import argparse
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from runtime.importing.sandbox import die_with_parent

if TYPE_CHECKING:
    import torch

    from runtime.building.contender_messages import Make, Place, Question, Reply
    from runtime.compiling.forms import Run
    from runtime.importing.tensor_program import TensorProgram

logger = logging.getLogger("runtime.contender")

MAX_RUNS = 64  # of one turn
SHORT_MS = 20.0  # runs below it are repeated before they are timed: others' turns cooled them
LATE = 3  # exit code of a guard whose peer is gone
OUT_OF_MEMORY = ("t allocate memory", "bad_alloc", "out of memory")


class Source(Protocol):
    """Where forms come from; `compiling.forms` but in tests."""

    def make(
        self,
        name: str,
        program: "TensorProgram",
        making: "Make",
        inputs: "list[list[torch.Tensor]]",
    ) -> None: ...

    def load(self, name: str, program: "TensorProgram | None", place: "Place") -> "Run": ...


class KnownForms:
    """The forms of `compiling.forms`."""

    def make(
        self,
        name: str,
        program: "TensorProgram",
        making: "Make",
        inputs: "list[list[torch.Tensor]]",
    ) -> None:
        """Raises `FormFailure`."""
        from runtime.compiling.forms import FORMS, make_form

        make_form(
            next(form for form in FORMS if form.name == name),
            program,
            Path(making.place.directory),
            max_rows=making.max_rows,
            calibration=inputs,
            num_threads=making.place.num_threads,
            device=making.place.device,
        )

    def load(self, name: str, program: "TensorProgram | None", place: "Place") -> "Run":
        """Raises `FormFailure`."""
        from runtime.compiling.forms import load_form

        return load_form(
            name,
            program,
            Path(place.directory),
            device=place.device,
            num_threads=place.num_threads,
        )


def main(source: Source | None = None) -> None:
    """Entry point of `python -m runtime.building.contender --connection FD`."""
    parser = argparse.ArgumentParser(prog="runtime.building.contender")
    parser.add_argument("--connection", required=True, type=int)
    parser.add_argument("--memory-bytes", type=int, default=0)
    arguments = parser.parse_args()
    connection = socket.socket(fileno=arguments.connection)
    may_signal = _may_signal()
    if may_signal:  # out of the build's group, whose end must not take the guard first
        os.setpgid(0, 0)
    process_id = os.fork()
    if process_id:
        sys.exit(guard(connection, process_id, may_signal=may_signal))
    if may_signal:
        os.setpgid(0, 0)
    die_with_parent()
    _limit_memory(arguments.memory_bytes)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    Contender(connection, source or KnownForms()).serve()


# --- the guard --------------------------------------------------------------------------


def guard(connection: socket.socket, process_id: int, *, may_signal: bool) -> int:
    """Waits until the form's process ends or the peer is gone; ends what is left then. The exit
    code says which it was: that of the process, 128 and its signal, or `LATE`."""
    poll = select.poll()
    descriptor = os.pidfd_open(process_id)
    poll.register(descriptor, select.POLLIN)
    poll.register(connection, select.POLLRDHUP)
    ready = {fd for fd, _ in poll.poll()}
    if may_signal:
        try:
            os.killpg(process_id, signal.SIGKILL)  # with the compilers that it started
        except ProcessLookupError:
            logger.debug("the group has ended already")
    if descriptor not in ready:
        return LATE  # the kernel ends the process with its parent, this one
    _, status = os.waitpid(process_id, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _may_signal() -> bool:
    """Whether the sandbox lets processes be signalled: older kernels cannot tell a build's own
    children from strangers. Their compilers then stay in the build's group, which its launcher
    ends."""
    try:
        os.kill(os.getpid(), 0)
    except PermissionError:
        return False
    return True


def _limit_memory(max_bytes: int) -> None:
    """Of what the process allocates; mapped files and address space do not count, so that a
    library's reservations are free."""
    if max_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))


# --- the form ---------------------------------------------------------------------------


class Contender:
    """Answers questions until the stream ends."""

    def __init__(self, connection: socket.socket, source: Source) -> None:
        self._connection = connection
        self._source = source
        self._program: TensorProgram | None = None
        self._run: Run | None = None
        self._held: dict[int, list[torch.Tensor]] = {}
        self._device = "cpu"

    def serve(self) -> None:
        from runtime.building.contender_messages import Refused, encode, read_question

        while (question := read_question(self._connection)) is not None:
            try:
                reply = self._reply(question)
            except Exception as error:  # a stranger's graph and its compilers raise anything
                logger.info("a question could not be answered", exc_info=True)
                reply = Refused(reason=_one_sentence(error))
            self._connection.sendall(encode(reply))

    def _reply(self, question: "Question") -> "Reply":
        from runtime.building import contender_messages as messages

        match question:
            case messages.Make(place=place, calibration=calibration):
                inputs = [messages.from_wire(each) for each in calibration]
                self._source.make(place.form, self._load_program(place), question, inputs)
                return messages.Done(peak_bytes=self._peak_bytes())
            case messages.Load(place=place):
                # As in a worker, which does not hold the weights twice.
                program = self._load_program(place) if place.form == "eager" else None
                self._use(place)
                self._run = self._source.load(place.form, program, place)
                return messages.Done(peak_bytes=self._peak_bytes())
            case messages.Answer(inputs=wire):
                outputs = messages.to_wire(self._call(messages.from_wire(wire)))
                return messages.Answered(outputs=outputs, peak_bytes=self._peak_bytes())
            case messages.Hold(rows=rows, inputs=wire):
                self._held[rows] = messages.from_wire(wire)
                self._call(self._held[rows])
                return self._time(rows, seconds=0.0)
            case messages.Turn(rows=rows, seconds=seconds):
                return self._time(rows, seconds)

    def _load_program(self, place: "Place") -> "TensorProgram":
        if self._program is None:
            from runtime.compiling.programs import load_program

            self._use(place)
            artifact_dir = Path(place.artifact_dir)
            self._program = load_program(artifact_dir, place.manifest, place.device)
        return self._program

    def _use(self, place: "Place") -> None:
        import torch

        torch.set_num_threads(place.num_threads)
        self._device = place.device

    def _call(self, inputs: "list[torch.Tensor]") -> "list[torch.Tensor]":
        assert self._run is not None, "a form is loaded before it is run"
        return self._run(inputs)

    def _time(self, rows: int, seconds: float) -> "Reply":
        from runtime.building.contender_messages import Times

        inputs = self._held[rows]
        runs_ms = [self._run_ms(inputs)]
        if seconds and runs_ms[0] < SHORT_MS:
            runs_ms.clear()
        deadline = time.perf_counter() + seconds
        while not runs_ms or (len(runs_ms) < MAX_RUNS and time.perf_counter() < deadline):
            runs_ms.append(self._run_ms(inputs))
        return Times(runs_ms=runs_ms, peak_bytes=self._peak_bytes())

    def _run_ms(self, inputs: "list[torch.Tensor]") -> float:
        started = time.perf_counter_ns()
        self._call(inputs)
        return (time.perf_counter_ns() - started) / 1e6

    def _peak_bytes(self) -> int:
        """Resident at most, and on a GPU what torch reserved there at most. The guard's fork
        began the count anew: a started program inherits that of its parent."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._device.startswith("cuda"):
            import torch

            peak += torch.cuda.max_memory_reserved(self._device)
        return peak


def _one_sentence(error: Exception) -> str:
    from runtime.compiling.forms import FormFailure
    from runtime.importing.exported import first_line
    from runtime.text.printable import printable

    if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        return "It needs more memory than an optimisation may take."
    if isinstance(error, FormFailure):
        return printable(str(error))[:400]
    return printable(f"It fails on an input that the program takes ({first_line(error)}).")[:400]


if __name__ == "__main__":
    main()
