"""Looks for a faster form of a tensor program that was built: candidates are made, proved and
timed, and the artifact is written anew with the winner's files.

Owns the order of the steps, the budget and the receipt. A candidate's way is `candidacy.py`'s,
the contest `contest.py`'s.
"""

import logging
import os
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from runtime.building.candidacy import Candidate, Course, directory_of, prepare
from runtime.building.contender_process import COMMAND
from runtime.building.contest import Outcome, hold_contest, report_all
from runtime.building.reporter import Reporter
from runtime.compiling.forms import FORMS, environment, form_directory, forms_for, unavailable
from runtime.compiling.packaging import (
    MANIFEST_NAME,
    RECEIPT_NAME,
    read_manifest,
    read_receipt,
    write_manifest,
)
from runtime.compiling.programs import load_program
from runtime.importing.program import ImportFailure
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import BuildReceipt, Manifest, Optimise, Optimised
from runtime.proving.candidate_cases import Cases, draw_cases
from runtime.proving.inputs import InputMaker, find_inputs
from runtime.proving.memory import available_bytes
from runtime.text.printable import printable

logger = logging.getLogger("runtime.build")

SCRATCH_NAME = ".forms"
MAX_BATCH_ROWS = 128  # of a run, as `Serve.max_batch_rows`
PREPARE_SHARE = 0.75  # of the budget; the rest is for measuring
NUM_CALIBRATION = 4
CALIBRATION_ROWS = 8
CONTENDER_SHARE = 0.9  # of the room in memory: what one process may allocate
KEPT_SHARE = 0.25  # of the room: how much loaded candidates may hold while others are made
NOTE = "Optimised: "  # starts the receipt's lines about it


def optimise(
    request: Optimise,
    reporter: Reporter,
    isolation: str,
    *,
    command: Sequence[str] = COMMAND,
) -> Optimised:
    """`output_dir` becomes a whole artifact. Raises `ImportFailure` or `ArtifactError` when the
    artifact cannot be loaded or nothing be measured of it, and `OSError`."""
    started = time.monotonic()
    with reporter.phase("load") as report:
        report(0.0, "loading the program")
        torch.set_num_threads(request.num_threads)
        artifact_dir = Path(request.artifact_dir)
        manifest, receipt = read_manifest(artifact_dir), read_receipt(artifact_dir)
        program = load_program(artifact_dir, manifest, request.device)
        makers = find_inputs(program)
        room_bytes = _room_bytes(request.memory_bytes)
        course = _course(request, manifest, program, makers[0], room_bytes, command)
        eager, *others = [Candidate(form) for form in forms_for(program, request.device)]
    _exclude(course, receipt, others)
    try:
        outcome = _run(course, program, makers, eager, others, room_bytes, request, reporter)
        if eager.name not in outcome.measured:
            why = eager.reason or "There was no time left."
            raise ImportFailure("nothing_measured", f"Nothing could be measured. {why}")
        known = next((each for each in receipt.candidates if each.name == eager.name), None)
        reports = report_all(course, eager, others, outcome, known)
    finally:
        for each in (eager, *others):
            each.end()
    with reporter.phase("package") as report:
        report(0.0, "writing the artifact")
        winner = next(each for each in (eager, *others) if each.name == outcome.best)
        served = "" if winner is eager else environment(request.device, request.num_threads)
        manifest = msgspec.structs.replace(manifest, form=winner.name, environment=served)
        receipt = _receipt(receipt, course, winner, others, outcome)
        seconds = receipt.phase_seconds | {"optimise": round(time.monotonic() - started, 3)}
        notes = [*receipt.notes, f"{NOTE}{isolation}."]
        receipt = msgspec.structs.replace(
            receipt, candidates=reports, phase_seconds=seconds, notes=notes
        )
        _package(course, winner, eager, Path(request.output_dir))
        write_manifest(Path(request.output_dir), manifest, receipt)
    return Optimised(manifest=manifest, receipt=receipt)


def _course(
    request: Optimise,
    manifest: Manifest,
    program: TensorProgram,
    maker: InputMaker,
    room_bytes: int,
    command: Sequence[str],
) -> Course:
    # An embedder is judged as a tensor program; its manifest has no schema of its own.
    judged = msgspec.structs.replace(manifest, schema=manifest.schema or program.schema)
    max_rows = max_rows_of(judged)
    # A GPU's driver reserves memory that it never touches: there the launcher's limit alone holds.
    is_limited = not request.device.startswith("cuda")
    return Course(
        artifact_dir=Path(request.artifact_dir),
        manifest=judged,
        scratch=Path(request.output_dir) / SCRATCH_NAME,
        device=request.device,
        num_threads=request.num_threads,
        max_rows=max_rows,
        accepts_loss=request.accepts_loss,
        memory_bytes=int(CONTENDER_SHARE * room_bytes) if is_limited else 0,
        calibration=_calibration(program, maker, max_rows),
        command=command,
    )


def max_rows_of(manifest: Manifest) -> int:
    """The largest run that serving makes of a tensor program; 1: its rows share none."""
    assert manifest.schema is not None, "a tensor program has a schema"
    if not manifest.schema.is_batched:
        return 1
    limits = [spec.max_shape[0] for spec in manifest.schema.inputs if spec.max_shape]
    return min([MAX_BATCH_ROWS, *(limit for limit in limits if limit is not None)])


# --- the steps --------------------------------------------------------------------------


def _exclude(course: Course, receipt: BuildReceipt, others: Sequence[Candidate]) -> None:
    """Those that need not be made to know their fate."""
    for each in others:
        if receipt.verdict == "unproved":
            each.drop(
                "unavailable", "Nothing could be proved of the program itself: see its notes."
            )
        elif (why := unavailable(each.form, course.device)) is not None:
            each.drop("unavailable", why)
        elif each.form.is_lossy and not course.accepts_loss:
            each.drop("lossy", "It changes answers, which the owner has not accepted: not tried.")


def _run(
    course: Course,
    program: TensorProgram,
    makers: list[InputMaker],
    eager: Candidate,
    others: list[Candidate],
    room_bytes: int,
    request: Optimise,
    reporter: Reporter,
) -> Outcome:
    now = time.monotonic()
    prepared_by = now + PREPARE_SHARE * request.budget_seconds
    done_by = now + request.budget_seconds
    with reporter.phase("prepare") as report:
        report(0.0, "asking the program as uploaded what candidates have to answer")
        wanted = [each for each in others if each.fate is None]
        cases = _draw(course, program, makers) if wanted else Cases([], [], is_batched=False)
        for index, each in enumerate(wanted):

            def tell(done: float, line: str, index: int = index) -> None:
                report((index + done) / len(wanted), line)

            prepare(course, each, cases, prepared_by, tell)
            report((index + 1) / len(wanted), _line(each))
            kept = [other for other in wanted if other.process is not None]
            if sum(other.peak_bytes for other in kept) > KEPT_SHARE * room_bytes:
                each.end()
    with reporter.phase("measure") as report:
        proved = [each for each in others if each.fate is None]
        return hold_contest(course, eager, proved, makers[0].make, room_bytes, done_by, report)


def _draw(course: Course, program: TensorProgram, makers: list[InputMaker]) -> Cases:
    schema = course.manifest.schema
    assert schema is not None, "a tensor program has a schema"
    examples = [program.example_inputs] if program.example_inputs else []
    return draw_cases(program, makers, schema, course.max_rows, examples)


def _line(candidate: Candidate) -> str:
    if candidate.fate is not None:
        return f"{candidate.name} is out: {candidate.reason}"
    assert candidate.proof is not None, "a candidate without a fate was proved"
    kept = candidate.proof.loss.describe() if candidate.loses else "proved to answer as eager does"
    return f"{candidate.name}: {kept}"


def _calibration(
    program: TensorProgram, maker: InputMaker, max_rows: int
) -> list[list[torch.Tensor]]:
    """Inputs of the program's own first."""
    batches = [maker.make(min(CALIBRATION_ROWS, max_rows), seed) for seed in range(NUM_CALIBRATION)]
    examples = program.example_inputs
    if examples and examples[0].dim() and examples[0].shape[0] <= max_rows:
        batches.insert(0, examples)
    return batches


def _room_bytes(limit_bytes: int) -> int:
    """Memory for all contenders together: what is free, within what the build may use."""
    room = available_bytes()
    if limit_bytes:
        mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        room = min(room, limit_bytes - mine)
    return max(0, room)


# --- the artifact -----------------------------------------------------------------------


def _package(course: Course, winner: Candidate, eager: Candidate, output_dir: Path) -> None:
    """Everything of the old artifact but its forms, and the winner's files."""
    old_forms = form_directory(course.artifact_dir, eager.name).parent
    for folder, folders, names in os.walk(course.artifact_dir):
        where = Path(folder).relative_to(course.artifact_dir)
        folders[:] = [name for name in folders if Path(folder, name) != old_forms]
        if where == Path():
            names = [name for name in names if name not in (MANIFEST_NAME, RECEIPT_NAME)]
        (output_dir / where).mkdir(exist_ok=True)
        for name in names:  # a link would need rights in the artifact, which the sandbox denies
            shutil.copyfile(Path(folder, name), output_dir / where / name)
    if winner is not eager:
        target = form_directory(output_dir, winner.name)
        target.parent.mkdir(parents=True)
        directory_of(course, winner.form).rename(target)
    shutil.rmtree(course.scratch, ignore_errors=True)


def _receipt(
    built: BuildReceipt,
    course: Course,
    winner: Candidate,
    others: Sequence[Candidate],
    outcome: Outcome,
) -> BuildReceipt:
    """The build's, with this optimisation's checks and notes in place of an earlier one's."""
    earlier = {form.name for form in FORMS} - {"eager"} | {each.name for each in others}
    checks = [check for check in built.checks if check.form not in earlier]
    for each in others:
        checks += each.proof.checks if each.proof is not None else []
    notes = [note for note in built.notes if not note.startswith(NOTE)]
    for size in sorted({size for each in outcome.measured.values() for size in each.runs_ms}):
        if size not in outcome.sizes:
            notes.append(f"{NOTE}a batch of {size} is too slow here to count in the contest.")
    if winner.loses and winner.proof is not None:
        loss = winner.proof.loss.describe()
        notes.append(f"{NOTE}{winner.name} changes the answers, as the owner accepts: {loss}.")
    return msgspec.structs.replace(
        built,
        verdict="lossy" if winner.loses else "equal" if built.verdict == "lossy" else built.verdict,
        checks=checks,
        device=course.device,
        torch_version=str(torch.__version__),
        environment=environment(course.device, course.num_threads),
        notes=[printable(note) for note in notes],
    )
