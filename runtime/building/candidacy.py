"""One candidate's way to the contest: its form is made, loaded as a worker would, and proved.

Each step runs in a process of the candidate's own; whatever goes wrong there becomes its fate
and its reason.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from runtime.building.contender_messages import Place
from runtime.building.contender_process import COMMAND, ContenderFailure, ContenderProcess
from runtime.compiling.forms import Form
from runtime.protocol import Fate, Manifest
from runtime.proving.candidate_cases import Cases
from runtime.proving.candidates import CandidateProof, prove_candidate

FORM_SECONDS = 300.0  # for all steps of one form
UPLOADED = "uploaded"  # the precision that changes nothing

Report = Callable[[float, str], None]


class Course(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all candidates. `memory_bytes` is what a process may allocate."""

    artifact_dir: Path
    manifest: Manifest
    scratch: Path
    device: str
    num_threads: int
    max_rows: int
    accepts_loss: bool
    memory_bytes: int
    calibration: Sequence[Sequence[torch.Tensor]]
    command: Sequence[str] = COMMAND


@dataclass
class Candidate:
    """A form, what is known of it, and, while it is wanted, the process that has it loaded.
    Without a `fate` it is still in the contest."""

    form: Form
    fate: Fate | None = None
    reason: str = ""
    proof: CandidateProof | None = None
    prepare_seconds: float | None = None
    peak_bytes: int = 0
    process: ContenderProcess | None = None

    @property
    def name(self) -> str:
        return self.form.name

    @property
    def loses(self) -> bool:
        """Its answers are not those of the program as uploaded, but for rounding."""
        return self.proof is not None and not self.proof.is_equal

    @property
    def rank(self) -> int:
        """How much it changes, for `choosing.choose`."""
        if self.form.is_lossy:
            return 2
        return int(self.form.precision != UPLOADED)

    def drop(self, fate: Fate, reason: str) -> None:
        """Out of the contest."""
        self.fate, self.reason = fate, reason
        self.end()

    def end(self) -> None:
        """Its process, if there is one. Idempotent."""
        if self.process is not None:
            self.peak_bytes = max(self.peak_bytes, self.process.peak_bytes)
            self.process.end()
            self.process = None


def directory_of(course: Course, form: Form) -> Path:
    """Where the form's files are written, and kept until it has lost."""
    return course.scratch / form.name


def prepare(
    course: Course, candidate: Candidate, cases: Cases, until: float, report: Report
) -> None:
    """Make, load and prove. The candidate keeps its loaded process, or has a fate."""
    until = min(until, time.monotonic() + FORM_SECONDS)
    try:
        _make(course, candidate, until, report)
        start(course, candidate, until, lambda s: report(0.5, f"loading, {s:.0f} s so far"))
        assert candidate.process is not None, "it has just been started"
        run = candidate.process.run
        candidate.proof = prove_candidate(
            candidate.name, run, cases, lambda done, line: report(0.5 + done / 2, line)
        )
        candidate.peak_bytes = candidate.process.peak_bytes
        _judge(course, candidate)
    except ContenderFailure as failure:
        candidate.drop(failure.fate, failure.reason)
    if candidate.fate is not None:
        shutil.rmtree(directory_of(course, candidate.form), ignore_errors=True)


def start(
    course: Course, candidate: Candidate, until: float, on_wait: Callable[[float], None]
) -> None:
    """A process that has the form loaded, unless there is one. Raises `ContenderFailure`."""
    if candidate.process is None:
        candidate.process = _process(course, candidate.form, until, on_wait)
        candidate.process.load()


def _make(course: Course, candidate: Candidate, until: float, report: Report) -> None:
    """In a process that ends with it: what a compiler takes is not what serving takes."""
    directory_of(course, candidate.form).mkdir(parents=True)
    started = time.monotonic()

    def say(seconds: float) -> None:
        report(0.0, f"making {candidate.name}, {seconds:.0f} s so far")

    report(0.0, f"making {candidate.name}")
    maker = _process(course, candidate.form, until, say)
    try:
        maker.make(course.max_rows, course.calibration)
    finally:
        maker.end()
    candidate.prepare_seconds = round(time.monotonic() - started, 3)


def _judge(course: Course, candidate: Candidate) -> None:
    """What the proof means for a form of this precision."""
    proof = candidate.proof
    assert proof is not None, "the candidate was proved"
    if proof.is_equal:
        return
    may_lose = candidate.form.is_lossy or candidate.form.precision != UPLOADED
    if not may_lose:
        candidate.drop("differs", f"It is not the program as uploaded ({proof.first_failure}).")
    elif not (proof.is_sound and proof.loss.is_bounded):
        what = proof.loss.describe() if proof.is_sound else proof.first_failure
        candidate.drop("differs", f"It loses more than an owner can accept ({what}).")
    elif proof.wide_loss is not None and not proof.wide_loss.is_bounded:
        candidate.drop(
            "differs",
            "On values larger than the examples' it loses more than an owner can accept "
            f"({proof.wide_loss.describe()}). Say which range the inputs have, and it is judged "
            "within that.",
        )


def _process(
    course: Course, form: Form, until: float, on_wait: Callable[[float], None]
) -> ContenderProcess:
    place = Place(
        artifact_dir=str(course.artifact_dir),
        manifest=course.manifest,
        form=form.name,
        directory=str(directory_of(course, form)),
        device=course.device,
        num_threads=course.num_threads,
    )
    schema = course.manifest.schema
    assert schema is not None, "a tensor program has a schema"
    return ContenderProcess(
        place,
        schema,
        until=until,
        memory_bytes=course.memory_bytes,
        on_wait=on_wait,
        command=course.command,
    )
