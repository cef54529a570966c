"""Forms that AOTInductor compiled: one shared library, loaded without a compiler.

Owns the options of compilation and what of a package is kept. Calling the library on a processor
is `compiled_library.py`'s.
"""

import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from runtime.compiling.forms.calling import load_calling, read_program_calling, save_calling
from runtime.compiling.forms.compiled_library import CompiledLibrary
from runtime.compiling.forms.form import Form, FormFailure, Loading, Making, Run
from runtime.compiling.forms.graphs import graph_of
from runtime.compiling.forms.precisions import uploaded_precision
from runtime.compiling.forms.processor import lacks_precision
from runtime.importing.tensor_program import TensorProgram

_COMPILERS = ("c++", "g++", "clang++")
# Sources and their records are of no use to a worker.
_LEFT_OUT = (".cpp", "_metadata.json", "_compile_flags.json", "_linker_flags.json")


class AotInductor:
    """Programs with a graph, compiled for this very machine."""

    def suits(self, form: Form, program: TensorProgram, device: str) -> bool:
        return program.program is not None and form.precision != uploaded_precision(program)

    def unavailable(self, form: Form, device: str) -> str | None:
        if not any(shutil.which(name) for name in _COMPILERS):
            return "There is no C++ compiler here."
        return lacks_precision(form.precision, device)

    def make(self, making: Making) -> None:
        graph = graph_of(making.program, making.form.precision)
        calling = read_program_calling(graph, making.program.schema)
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its tree specs
            package = Path(scratch) / "form.pt2"
            import torch._inductor

            with torch.no_grad():
                torch._inductor.aoti_compile_and_package(
                    graph, package_path=str(package), inductor_configs=_settings(making)
                )
            _unpack(package, making.directory)
        save_calling(making.directory, calling)

    def load(self, loading: Loading) -> Run:
        libraries = sorted(loading.directory.glob("*.so"))
        if len(libraries) != 1:
            raise FormFailure("The compiled library is missing.")
        calling = load_calling(loading.directory)
        # Operators without a C interface are called by way of Python's runner.
        has_others = libraries[0].with_suffix(".json").exists()
        if loading.device == "cpu" and not has_others:
            return calling.wrap(CompiledLibrary(libraries[0], len(calling.output_dtypes)))
        return calling.wrap(_runner(libraries[0], loading.device), loading.device)


def _settings(making: Making) -> dict[str, Any]:
    return {
        # Weights are constants: folded, and packed for the kernels that read them.
        "freezing": True,
        "cpp.threads": making.num_threads,
        "compile_threads": 1,  # no pool of processes beside the build's own
        "aot_inductor.precompile_headers": False,
    }


def _unpack(package: Path, directory: Path) -> None:
    """The library and what it reads, flat; `torch._inductor.aoti_load_package` would unpack the
    archive at each start, which a sandbox has no room for."""
    with zipfile.ZipFile(package) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if "aotinductor" not in path.parts or path.name.endswith(_LEFT_OUT):
                continue
            with archive.open(member) as source, (directory / path.name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _runner(library: Path, device: str) -> Any:
    runners: Any = torch._C
    if device == "cpu":
        runner: Any = runners._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    else:
        runner = runners._aoti.AOTIModelContainerRunnerCuda(
            str(library), 1, device, str(library.parent)
        )

    def call(inputs: list[Tensor]) -> list[Tensor]:
        return runner.run(inputs)

    return call
