"""The operators where threads and memory are short, and where their library changes meanwhile."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.execution.kernels import fastest_variant

pytestmark = pytest.mark.skipif(fastest_variant() is None, reason="no C++ operators were compiled")

FEW_THREADS = """
import resource, torch
torch.set_num_threads(4)
from runtime.execution.linear import PackedLinear
layer, x = PackedLinear(torch.randn(2048, 256)), torch.randn(5, 256)
torch.set_num_threads(1)
expected = layer(x)
torch.set_num_threads(4)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20),) * 2)  # less than a thread's stack
assert all(torch.equal(layer(x), expected) for _ in range(20))
print("went on")
"""

RELOADED = """
import pathlib, shutil, torch
from runtime.execution import kernels, native
from runtime.execution.linear import PackedLinear
variant = kernels.fastest_variant()
loaded, other = native.library_path(variant), pathlib.Path("other.so").absolute()
shutil.copy(loaded, other)
kernels.library_path = lambda _: other  # the sources changed and were compiled again
layer = PackedLinear(torch.randn(32, 8))
assert layer.is_packed
print("went on")
"""


@pytest.mark.parametrize("script", [FEW_THREADS, RELOADED], ids=["few-threads", "reloaded"])
@pytest.mark.skipif(sys.platform != "linux", reason="limits and libraries as on Linux")
def test_a_process_goes_on(script: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "OMP_WAIT_POLICY": "PASSIVE", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "went on\n"
