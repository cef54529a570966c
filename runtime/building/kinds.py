"""Decides what kind of program an upload is, and so which build it gets.

The one table of kinds; each kind's detection lies with its build.
"""

from runtime.building.outcome import Outcome
from runtime.building.reporter import Reporter
from runtime.importing.archive import UnpackedUpload


def build_program(upload: UnpackedUpload, reporter: Reporter) -> Outcome:
    """Import, prove and measure, as the upload's kind asks. Raises `ImportFailure`."""
    # Imported late: a tensor program's build needs no transformers.
    if upload.kind == "pt2":
        from runtime.building.tensor import build_tensor

        return build_tensor(upload, reporter)
    from runtime.importing.embedder_layout import is_embedder

    if is_embedder(upload.path):
        from runtime.building.embedder import build_embedder

        return build_embedder(upload, reporter)
    from runtime.building.decoder import build_decoder

    return build_decoder(upload, reporter)
