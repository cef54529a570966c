"""Tells a decoder's graph from any other tensor program by what goes in and comes out.

Owns the choice of the input that is token ids and the output that is logits. Whether the graph
can be paged is `page.py`'s question.
"""

from dataclasses import dataclass

import sympy
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.shapes import axes_of, tensor_of
from runtime.importing.exported import ExportedProgramModel
from runtime.importing.program import ImportFailure
from runtime.importing.signature import Leaf, Signature, axis_bounds, read_signature

INTEGERS = (torch.int64, torch.int32)
# A vocabulary may be padded (to a multiple of 64, say), or lack special tokens on one side.
MAX_VOCAB_DIFFERENCE = 16
MAX_VOCAB_DIFFERENCE_SHARE = 0.05
LOOKUPS = ("aten::embedding", "aten::index_select", "aten::index")
# Operators that leave the numbers of a tensor as they are.
LAYOUT = ("_to_copy", "alias", "clone", "contiguous", "detach", "expand", "flatten", "reshape")
LAYOUT += ("lift_fresh_copy", "permute", "select", "slice", "squeeze", "t", "to", "transpose")
LAYOUT += ("unsqueeze", "view")


@dataclass(frozen=True)
class DecoderSignature:
    """Which flattened input and output are the token ids `[batch, length]` and the logits
    `[batch, length, vocab_size]`; `max_tokens` is the longest length the export allows."""

    input_at: int
    output_at: int
    dtype: torch.dtype  # of the token ids
    batch: sympy.Expr
    length: sympy.Expr
    max_tokens: int | None
    vocab_size: int


def is_decoder_graph(program: ExportedProgram | ExportedProgramModel) -> bool:
    """Whether a program maps token ids to a score for every token of the vocabulary they are
    looked up in. Does not run it: a masked language model looks the same."""
    if isinstance(program, ExportedProgramModel):
        program = program.program
    try:
        signature = read_decoder_signature(program)
    except (NotPageable, ImportFailure):
        return False
    rows = embedding_rows(program, signature)
    return any(_is_same_vocabulary(signature.vocab_size, num_rows) for num_rows in rows)


def read_decoder_signature(program: ExportedProgram) -> DecoderSignature:
    """Raises `NotPageable` unless there are one integer matrix in and logits out."""
    signature = read_signature(program)
    tensors = [(at, leaf) for at, leaf in enumerate(signature.inputs) if leaf.spec]
    if len(tensors) != 1 or tensors[0][1].dtype not in INTEGERS or len(tensors[0][1].axes) != 2:
        raise NotPageable(
            "A decoder takes one input, integer token ids [batch, length]; this graph does not."
        )
    input_at, ids = tensors[0]
    assert ids.dtype is not None, "a tensor has a dtype"
    batch, length = ids.axes
    output_at, vocab_size = _logits(signature, batch, length)
    return DecoderSignature(
        input_at=input_at,
        output_at=output_at,
        dtype=ids.dtype,
        batch=batch,
        length=length,
        max_tokens=axis_bounds(length, program.range_constraints)[1],
        vocab_size=vocab_size,
    )


def _logits(signature: Signature, batch: sympy.Expr, length: sympy.Expr) -> tuple[int, int]:
    def is_logits(leaf: Leaf) -> bool:
        return (
            leaf.spec is not None
            and leaf.dtype is not None
            and leaf.dtype.is_floating_point
            and len(leaf.axes) == 3
            and leaf.axes[0] in (batch, 1)
            and leaf.axes[1] == length
            and bool(leaf.axes[2].is_Integer)
        )

    found = [(at, leaf) for at, leaf in enumerate(signature.outputs) if is_logits(leaf)]
    named = [(at, leaf) for at, leaf in found if leaf.spec and leaf.spec.name == "logits"]
    if not found:
        raise NotPageable("No output has the shape of logits, [batch, length, vocabulary].")
    # Without a name, the widest: hidden states beside it have a model's width, not a vocabulary.
    at, leaf = (named or sorted(found, key=lambda pair: -int(pair[1].axes[2])))[0]  # type: ignore[arg-type]
    return at, int(leaf.axes[2])  # type: ignore[arg-type]


def embedding_rows(
    program: ExportedProgram, signature: DecoderSignature, *, is_direct: bool = False
) -> list[int]:
    """The row counts of the tables that the token ids, or integers computed of them unless it
    `is_direct`, are looked up in."""
    placeholders = program.graph.find_nodes(op="placeholder")
    name = list(program.graph_signature.user_inputs)[signature.input_at]
    ids = next(node for node in placeholders if node.name == name)
    rows: list[int] = []
    pending: list[Node] = [ids]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        for user in node.users:
            value = tensor_of(user)
            name = getattr(getattr(user.target, "_schema", None), "name", "")
            if name in LOOKUPS and user.args[0] is not node:
                rows += _table_rows(user)
            elif is_direct and name.removeprefix("aten::") not in LAYOUT:
                continue
            elif value is not None and value.dtype in INTEGERS and user not in seen:
                seen.add(user)
                pending.append(user)
    return rows


def num_embedded_ids(program: ExportedProgram, signature: DecoderSignature) -> int:
    """How many ids of the vocabulary the tables hold that ids are looked up in as they are. What
    is looked up by a number computed of them, such as a hash, says nothing about ids."""
    rows = embedding_rows(program, signature, is_direct=True)
    return min([*rows, signature.vocab_size])


def _table_rows(node: Node) -> list[int]:
    table = node.args[0]
    if tensor_of(table) is None:
        return []
    sizes = axes_of(table)
    return [int(sizes[0])] if sizes and sizes[0].is_Integer else []  # type: ignore[arg-type]


def _is_same_vocabulary(vocab_size: int, num_rows: int) -> bool:
    difference = abs(vocab_size - num_rows)
    is_small = min(vocab_size, num_rows) * 2 <= max(vocab_size, num_rows)
    allowed = max(MAX_VOCAB_DIFFERENCE, MAX_VOCAB_DIFFERENCE_SHARE * max(vocab_size, num_rows))
    return difference <= allowed and not is_small
