"""What a kind of build gives: everything of the artifact but its receipt's last lines."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from runtime.protocol import CandidateReport, Check, Manifest, Verdict


class Outcome(msgspec.Struct, kw_only=True):
    """What import, proof and measurement found. `package` writes the program's files into the
    artifact directory it is given and returns the names of those of the upload not used."""

    manifest: Manifest
    verdict: Verdict
    checks: list[Check]
    candidates: list[CandidateReport]
    notes: list[str]
    warnings: list[str] = []
    route: str = ""  # of a decoder: how its attention was reached, in one sentence
    package: Callable[[Path], list[str]]
