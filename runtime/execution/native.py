"""Compiles the C++ operators for every instruction set of this machine's architecture.

`python -m runtime.execution.native` runs at install or image build; workers only load the result,
since their sandbox has no compiler. Does not load anything itself: see `kernels.py`.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE_DIR = Path(__file__).parent
SOURCES = ("cpu_attention.cpp", "cpu_linear.cpp", "cpu_rows.cpp", "cpu_threads.cpp")
HEADERS = ("cpu_kernels.h", "cpu_linear.h", "cpu_threads.h", "cpu_tiles.h", "cpu_vectors.h")
FLAGS = ("-std=gnu++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
FLAGS += ("-fopenmp", "-fvisibility=hidden", "-DNDEBUG")
COMPILE_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Variant:
    """One compilation. `capability` is what torch must report of the CPU for it to run."""

    name: str
    flags: tuple[str, ...]
    capability: str | None
    needs_bfloat16: bool = False  # instructions that multiply bfloat16

    @property
    def namespace(self) -> str:
        """Of its operators in `torch.ops`, so that several can be loaded side by side."""
        return f"tapeout_{self.name}"

    @property
    def is_supported(self) -> bool:
        """Whether this CPU can run it (`ATEN_CPU_CAPABILITY` lowers what torch reports)."""
        if self.capability is None:
            return True
        if self.needs_bfloat16 and not torch.cpu._is_avx512_bf16_supported():
            return False
        levels = ("DEFAULT", "AVX2", "AVX512")
        found = torch.backends.cpu.get_cpu_capability()
        return found in levels and levels.index(found) >= levels.index(self.capability)


AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c")
AVX512 += ("-mprefer-vector-width=512",)
X86_VARIANTS = (
    Variant("avx512_bf16", (*AVX512, "-mavx512bf16"), "AVX512", needs_bfloat16=True),
    Variant("avx512", AVX512, "AVX512"),
    Variant("avx2", ("-mavx2", "-mfma", "-mf16c"), "AVX2"),
)
OTHER_VARIANTS = (Variant("generic", (), None),)


def variants() -> tuple[Variant, ...]:
    """What is compiled on this architecture, fastest first."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return X86_VARIANTS if is_x86 else OTHER_VARIANTS


def library_path(variant: Variant) -> Path:
    """Where a variant lies. The name holds the torch version and a digest of source and flags, so
    that a library made for something else is never loaded."""
    digest = hashlib.sha256(repr((FLAGS, variant.flags)).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((SOURCE_DIR / name).read_bytes())
    version = torch.__version__.replace("+", "-")
    file_name = f"kernels-{variant.name}-torch{version}-{digest.hexdigest()[:12]}.so"
    return native_dir() / file_name


def native_dir() -> Path:
    """`TAPEOUT_NATIVE_DIR`, or `build` beside this file."""
    return Path(os.environ.get("TAPEOUT_NATIVE_DIR") or SOURCE_DIR / "build")


class CompileError(Exception):
    """A library could not be made; the message is one line for the operator."""


def find_compiler() -> str | None:
    """`CXX`, or the first of c++, g++, clang++ on the path."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def compile_variant(variant: Variant, compiler: str) -> Path:
    """Compile one variant unless it is there. Raises `CompileError`."""
    target = library_path(variant)
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            made = Path(directory) / "kernels.so"
            _run(compile_command(variant, compiler, made))
            made.replace(target)
    except OSError as error:
        raise CompileError(f"{target.parent} is not writable ({error.strerror})") from error
    return target


def compile_command(variant: Variant, compiler: str, output: Path) -> list[str]:
    """Compiles and links a variant against the torch that runs this."""
    root = Path(torch.__file__).parent
    include, library = root / "include", root / "lib"
    return [
        *(compiler, *FLAGS, *variant.flags),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DTAPEOUT_LIBRARY={variant.namespace}",
        *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
        *(str(SOURCE_DIR / name) for name in SOURCES),
        *("-o", str(output)),
        *(f"-L{library}", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - the operator's own compiler, our own arguments
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{command[0]} took over {COMPILE_TIMEOUT_SECONDS} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise CompileError(f"{command[0]} failed: {lines[0].strip()[:300]}")


def main() -> int:
    """Compile every variant. Always 0: without the C++ operators, torch's serve."""
    compiler = find_compiler()
    if compiler is None:
        _say("no C++ compiler was found. Slower operators will serve on this CPU.")
        return 0
    made = []
    for variant in variants():
        try:
            made.append(compile_variant(variant, compiler))
            _say(f"{variant.name} is ready.")
        except CompileError as error:
            _say(f"{variant.name} was not compiled: {error}.")
    if not made:
        _say("none could be compiled. Slower operators will serve on this CPU.")
        return 0
    for stale in set(native_dir().glob("*.so")) - set(made):
        stale.unlink(missing_ok=True)
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"C++ operators: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
