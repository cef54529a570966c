"""The program as uploaded, run operator by operator: the form that every other is held against."""

from runtime.compiling.forms.form import Form, FormFailure, Loading, Making, Run
from runtime.importing.tensor_program import TensorProgram


class Eager:
    """Needs no files of its own: the artifact holds the program anyway."""

    def suits(self, form: Form, program: TensorProgram, device: str) -> bool:
        return True

    def unavailable(self, form: Form, device: str) -> str | None:
        return None

    def make(self, making: Making) -> None:
        pass

    def load(self, loading: Loading) -> Run:
        if loading.program is None:
            raise FormFailure("The eager form is the program itself, which was not loaded.")
        return loading.program.run
