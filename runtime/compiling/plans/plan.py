"""What a plan holds, and its file.

A plan is the graph that a build proved and chose, node for node, with where each of its tensors
comes from. It is applied only to the program, by the code and with the versions that it was made
with; `PlanUnusable` says what differs, and the graph is then derived anew.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch

import runtime
from runtime.execution.attention import LayerSpec
from runtime.execution.kernels import fastest_variant

PLAN_NAME = "program.plan"
DIGEST_BYTES = 32
# Whose change may change what a plan should say, or what it means.
CODE = ("compiling/**/*.py", "execution/ops.py", "execution/linear.py", "execution/cpu_*.cpp")


class PlanUnusable(Exception):
    """The plan is not this program's, or not this software's. The message is a short clause."""


class StoredTensor(msgspec.Struct, frozen=True, array_like=True):
    """A strided view of a member of `program.pt2`, or without one of `data`."""

    dtype: str
    size: list[int]
    stride: list[int]
    offset: int  # elements
    member: str = ""
    data: bytes = b""


class Site(msgspec.Struct, frozen=True, tag=True):
    """An `AttentionSite`."""

    layer_index: int


class Packed(msgspec.Struct, frozen=True, tag=True):
    """A `PackedLinear` of layers that read one input."""

    weights: list[StoredTensor]
    biases: list[StoredTensor | None]


class Lookup(msgspec.Struct, frozen=True, tag=True):
    """A `PackedEmbedding` of the layer called `packed`."""

    packed: str


class PlannedNode(msgspec.Struct, frozen=True, array_like=True):
    """A node of a graph; see `arguments` for how its target and arguments are written."""

    name: str
    op: str
    target: str
    args: Any
    kwargs: Any


class Conditions(msgspec.Struct, frozen=True):
    """What must be as it was for a plan to hold."""

    code: str
    torch: str
    operators: str  # the C++ operators' variant; empty for plain torch
    form: str
    max_context_tokens: int
    program: str  # digest of its members' names, sizes and checksums


class Plan(msgspec.Struct, frozen=True):
    """`witness` holds logits that `witness.py`'s batch gave when the plan was made."""

    conditions: Conditions
    layers: list[LayerSpec]
    vocab_size: int
    dtype: str
    nodes: list[PlannedNode]
    tensors: dict[str, StoredTensor]
    modules: dict[str, Site | Packed | Lookup]
    witness: StoredTensor


def conditions_now(form: str, max_context_tokens: int, program: str) -> Conditions:
    """Of this process and a program with this digest."""
    variant = fastest_variant()
    return Conditions(
        code=code_digest(),
        torch=str(torch.__version__),
        operators=variant.name if variant else "",
        form=form,
        max_context_tokens=max_context_tokens,
        program=program,
    )


def check_conditions(plan: Plan, now: Conditions) -> None:
    """Raises `PlanUnusable`."""
    made = plan.conditions
    changed = [name for name in made.__struct_fields__ if getattr(made, name) != getattr(now, name)]
    if changed:
        raise PlanUnusable(f"it was made with another {' and another '.join(changed)}")


@cache
def code_digest() -> str:
    """Of the sources that make plans and give them their meaning."""
    root = Path(runtime.__path__[0])
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in root.glob(pattern)):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_plan(path: Path, plan: Plan) -> None:
    """The file begins with the digest of the rest."""
    data = msgspec.msgpack.encode(plan)
    path.write_bytes(hashlib.sha256(data).digest() + data)


def read_plan(path: Path) -> Plan:
    """Raises `PlanUnusable`."""
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError as error:
        raise PlanUnusable("the artifact has none") from error
    digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        raise PlanUnusable("its file is damaged")
    try:
        return msgspec.msgpack.decode(data, type=Plan)
    except msgspec.DecodeError as error:
        raise PlanUnusable("it was written by another release") from error
