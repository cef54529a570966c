"""Every backend against dense float64 attention, on ragged paged batches full of NaN."""

import dataclasses
import math
import os
import subprocess
import sys

import numpy
import pytest
import torch

from runtime.execution.attention import AttentionBackend, choose_backend
from runtime.execution.cpu import CpuAttention
from runtime.execution.native import Variant, library_path, variants
from runtime.execution.reference import ReferenceAttention
from tests.runtime.execution.attention_cases import (
    CASES,
    RAGGED,
    TOLERANCE,
    Case,
    deviation,
    make_inputs,
)


@pytest.fixture(params=[None, *variants()], ids=lambda v: v.name if v else "reference")
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    variant: Variant | None = request.param
    if variant is None:
        return ReferenceAttention()
    if not variant.is_supported:
        pytest.skip(f"this CPU has no {variant.name}")
    if not library_path(variant).is_file():
        pytest.skip(f"{variant.name} was not compiled (python -m runtime.execution.native)")
    return CpuAttention(variant)


@pytest.mark.parametrize("name", CASES)
def test_backend_equals_dense_attention(backend: AttentionBackend, name: str) -> None:
    assert deviation(backend, CASES[name]) < TOLERANCE[CASES[name].dtype]


def test_result_does_not_depend_on_neighbours_or_threads(backend: AttentionBackend) -> None:
    inputs = make_inputs(Case(RAGGED, dtype=torch.bfloat16))
    together = inputs.attend(backend)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(inputs.attend(backend), together)
    finally:
        torch.set_num_threads(num_threads)
    alone = make_inputs(Case(RAGGED[:1], dtype=torch.bfloat16))
    alone.query = inputs.query[:1]
    # The first sequence's past is drawn first, so it is the same in both.
    assert torch.equal(alone.attend(backend), together[:1])


def test_nan_in_a_context_is_not_hidden(backend: AttentionBackend) -> None:
    inputs = make_inputs(Case(((1, 40), (20, 40))))
    inputs.keys[0] = torch.nan
    output = inputs.attend(backend)
    assert output[0].isnan().all()
    assert not output[1:].isnan().any()


def test_float64_serves_as_the_oracle(backend: AttentionBackend) -> None:
    assert deviation(backend, Case(RAGGED, dtype=torch.float64)) < 1e-13


@pytest.mark.parametrize("backend", variants(), ids=lambda v: v.name, indirect=True)
def test_compiled_op_refuses_what_would_leave_the_pool(backend: AttentionBackend) -> None:
    inputs = make_inputs(Case(((1, 40),)))
    inputs.metadata.block_tables[0, 1] = inputs.pool.num_blocks
    with pytest.raises(RuntimeError, match="outside the pool"):
        inputs.attend(backend)
    inputs = make_inputs(Case(((1, 40),)))
    inputs.metadata.slots[0] = -1
    with pytest.raises(RuntimeError, match="outside the pool"):
        inputs.attend(backend)
    inputs = make_inputs(Case(((1, 40),)))
    inputs.metadata.context_lens[0] = 1000
    with pytest.raises(RuntimeError, match="more than its blocks hold"):
        inputs.attend(backend)


@pytest.mark.parametrize("backend", variants(), ids=lambda v: v.name, indirect=True)
def test_compiled_op_refuses_metadata_of_other_lengths(backend: AttentionBackend) -> None:
    """It would read beyond their ends, or before the query."""
    inputs = make_inputs(Case(((1, 40), (2, 40))))
    good = inputs.metadata
    bad = {
        "query_start": good.query_start[:-1],
        "block_tables": good.block_tables[:1].contiguous(),
    }
    for name, tensor in bad.items():
        inputs.metadata = dataclasses.replace(good, **{name: tensor})
        with pytest.raises(RuntimeError, match="one longer than context_lens"):
            inputs.attend(backend)
    inputs.metadata = dataclasses.replace(good, query_start=good.query_start.clone())
    inputs.metadata.query_start[0] = -1
    with pytest.raises(RuntimeError, match="must not be negative"):
        inputs.attend(backend)


@pytest.mark.parametrize("backend", variants(), ids=lambda v: v.name, indirect=True)
def test_compiled_op_refuses_slopes_of_other_heads(backend: AttentionBackend) -> None:
    inputs = make_inputs(Case(((1, 40),), has_slopes=True))
    inputs.spec = dataclasses.replace(inputs.spec, alibi_slopes=(0.5,))
    with pytest.raises(RuntimeError, match="one float per query head"):
        inputs.attend(backend)


def test_a_missing_sink_is_told_from_one_of_little_weight(backend: AttentionBackend) -> None:
    inputs = make_inputs(Case(RAGGED))
    without = inputs.attend(backend)
    inputs.spec = dataclasses.replace(inputs.spec, sinks=(-math.inf,) * 6)
    assert torch.equal(inputs.attend(backend), without)
    inputs.spec = dataclasses.replace(inputs.spec, sinks=(40.0,) * 6)
    assert float(inputs.attend(backend).abs().max()) < 1e-6


def test_choose_backend_takes_the_compiled_op_where_there_is_one() -> None:
    usable = [v for v in variants() if v.is_supported and library_path(v).is_file()]
    expected = f"cpu-{usable[0].name}" if usable else "reference"
    assert choose_backend("cpu").name == expected
    assert choose_backend("meta").name == "reference"


TRITON_CASES = ["grouped", "odd width", "odd blocks", "soft cap and window", "only decoding"]
# Not bfloat16: the interpreter keeps it as uint16 and multiplies it as such.
TRITON_CASES += ["sharing one kv head", "float16", "alibi", "sinks and window", "everything"]
TRITON_CASES += ["decoding", "decoding, one kv head", "decoding, window and sinks"]
TRITON_CASES += ["decoding, everything"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_triton_kernels_equal_dense_attention_on_a_gpu(name: str) -> None:
    inputs = make_inputs(CASES[name])
    found = inputs.attend_on("cuda", choose_backend("cuda")).double()
    assert float((found - inputs.expected()).abs().max()) < TOLERANCE[CASES[name].dtype]


def test_triton_kernels_compile_for_gpus_without_one() -> None:
    """Down to machine code for Ampere and Hopper, which the interpreter does not check."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.execution.compile_triton"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["80", "90"]


def in_the_interpreter(script: str, *arguments: str) -> list[str]:
    """The words that a script prints about the backends `split`, which cuts a context into at most
    4 parts for 2 kv heads, and `whole`. In a process of its own: the interpreter is chosen when
    the kernels are defined."""
    triton = pytest.importorskip("triton")
    if (
        triton.__version__.startswith("3.6")
        and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
    ):
        pytest.skip("the interpreter of Triton 3.6 cannot loop with NumPy 2.4")
    preamble = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "torch.use_deterministic_algorithms(True)  # fills new memory with NaN\n"
        "assert torch.empty(3, device='cpu').isnan().all()\n"
        "from tests.runtime.execution.attention_cases import *\n"
        "from runtime.execution.triton_attention import TritonAttention\n"
        "split, whole = TritonAttention(4), TritonAttention(4, 128)\n"
        "assert split.num_splits(2) == 4 and whole.num_splits(2) == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", preamble + script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_triton_kernels_equal_dense_attention() -> None:
    script = "for name in sys.argv[1:]: print(deviation(split, CASES[name]))\n"
    found = map(float, in_the_interpreter(script, *TRITON_CASES))
    for name, worst in dict(zip(TRITON_CASES, found, strict=True)).items():
        assert worst < TOLERANCE[CASES[name].dtype], (name, worst)


# The second and the last sequence become padding, whose blocks are in no pool; then only the first
# sequence is left.
NEIGHBOURS_SCRIPT = """
inputs = make_inputs(Case(DECODES[-4:], has_sinks=True))
expected = inputs.expected()
together = inputs.attend(split)
padding, real = torch.tensor([1, 3]), torch.tensor([0, 2])
inputs.metadata.slots[padding] = -1
inputs.metadata.context_lens[padding] = 0
inputs.metadata.block_tables[padding] = 2**30
for backend in (whole, split):
    output = inputs.attend(backend)
    print(float((output[real] - expected[real]).abs().max()), int(output[padding].count_nonzero()))
alone = make_inputs(Case(DECODES[-4:-3], has_sinks=True))
alone.query = inputs.query[:1]
print(torch.equal(output[real], together[real]), torch.equal(alone.attend(split), together[:1]))
"""


def test_a_triton_result_does_not_depend_on_padding_or_neighbours() -> None:
    *found, is_equal_to_padded, is_equal_alone = in_the_interpreter(NEIGHBOURS_SCRIPT)
    assert found[1::2] == ["0", "0"], "padding sees nothing"
    assert max(map(float, found[::2])) < TOLERANCE[torch.float32]
    assert (is_equal_to_padded, is_equal_alone) == ("True", "True")
