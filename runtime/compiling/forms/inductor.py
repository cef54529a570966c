"""Inductor behind `torch.compile`: named in every receipt, but not a form that can be served.

It compiles as it meets new shapes. A warmed cache does not help: `torch.compile` looks for the
compiler before it looks at what was compiled, and a worker's sandbox starts no programs and
writes no files. `aot_inductor.py` is the same compiler ahead of time, with less around a call.
"""

from runtime.compiling.forms.form import Form, FormFailure, Loading, Making, Run
from runtime.importing.tensor_program import TensorProgram

_REASON = (
    "torch.compile needs a compiler as it serves, which a worker's sandbox has not; aot_inductor "
    "is the same compiler ahead of time."
)


class Inductor:
    """Suits what `AotInductor` suits, and is never to be had."""

    def suits(self, form: Form, program: TensorProgram, device: str) -> bool:
        return program.program is not None

    def unavailable(self, form: Form, device: str) -> str | None:
        return _REASON

    def make(self, making: Making) -> None:
        raise FormFailure(_REASON)

    def load(self, loading: Loading) -> Run:
        raise FormFailure(_REASON)
