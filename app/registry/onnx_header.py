"""Walks the headers of an ONNX file: its inputs and outputs, operators, and where weights lie.

Weights, attributes' values and documentation are stepped over; nothing is loaded and nothing is
judged. The numbers are those of fields in onnx.proto.
"""

import re
from math import prod
from typing import BinaryIO

import msgspec

from app.registry.protobuf import BYTES, VARINT, Budget, Field, Reader

MAX_TENSORS = 100_000
MAX_EXTERNAL_FILES = 20_000
MAX_DEPTH = 16  # of graphs inside attributes of nodes
MAX_TEXT_BYTES = 64 * 1024
MAX_LISTED = 16  # values of a list in an attribute, before the rest is stepped over
# Bits of a value, by data type; of strings none.
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64,
    15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
STRING = 8

_HEAD = re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42\x72]")


class OnnxHeader(msgspec.Struct):
    """What a file's headers say. `external` is, by location as written, how many bytes of that
    file its tensors need."""

    ir_version: int = 0
    opsets: dict[str, int] = {}
    operators: set[tuple[str, str]] = set()  # (domain, name) of each kind of node
    functions: set[tuple[str, str]] = set()  # those that the file defines itself
    initializers: set[str] = set()
    inputs: dict[str, str] = {}  # name -> kind: tensor, string, or what is no tensor
    outputs: dict[str, str] = {}
    external: dict[str, int] = {}
    num_tensors: int = 0
    has_graph: bool = False
    has_sparse: bool = False
    has_training: bool = False


def looks_like_onnx(head: bytes) -> bool:
    """By the first bytes of a file as the ONNX libraries write them: ir_version, then another
    field of a model."""
    return _HEAD.match(head) is not None


def read_header(file: BinaryIO, start: int, size_bytes: int, budget: Budget) -> OnnxHeader:
    """Raises `ValueError` for what is no ONNX file, and beyond the budget."""
    header = OnnxHeader()
    _Walk(Reader(file, start, size_bytes, budget), header).model()
    if not header.has_graph or not header.ir_version:
        raise ValueError("it holds no graph")
    return header


class _Walk:
    """One pass over a file, filling in `header`. Raises `ValueError`."""

    def __init__(self, reader: Reader, header: OnnxHeader) -> None:
        self._reader = reader
        self._header = header

    def model(self) -> None:
        reader, header = self._reader, self._header
        for field in reader.fields(reader.end):
            match field.number, field.wire:
                case 1, 0:
                    header.ir_version = field.value
                case 7, 2:
                    header.has_graph = True
                    self._graph(field.value, 0, header)
                case 8, 2:
                    self._opset(field.value)
                case 20, 2:
                    header.has_training = True
                case 25, 2:
                    self._function(field.value)
                case _:
                    pass

    def _opset(self, end: int) -> None:
        domain, version = "", 0
        for field in self._reader.fields(end):
            if (field.number, field.wire) == (1, BYTES):
                domain = self._name(field)
            elif (field.number, field.wire) == (2, VARINT):
                version = field.value
        self._header.opsets[domain] = version

    def _function(self, end: int) -> None:
        domain = name = ""
        for field in self._reader.fields(end):
            match field.number, field.wire:
                case 1, 2:
                    name = self._name(field)
                case 10, 2:
                    domain = self._name(field)
                case 7, 2:
                    self._node(field.value, 1)
                case _:
                    pass
        self._header.functions.add((domain, name))

    def _graph(self, end: int, depth: int, ends: OnnxHeader | None = None) -> None:
        """`ends` is what takes the inputs and outputs, of the outermost graph."""
        if depth > MAX_DEPTH:
            raise ValueError("its graphs are nested too deeply")
        for field in self._reader.fields(end):
            match field.number, field.wire:
                case 1, 2:
                    self._node(field.value, depth)
                case 5, 2:
                    name = self._tensor(field.value)
                    if ends:
                        ends.initializers.add(name)
                case 11 | 12, 2 if ends:
                    side = ends.inputs if field.number == 11 else ends.outputs
                    name, kind = self._value(field.value)
                    side[name] = kind
                case 15, 2:
                    self._header.has_sparse = True
                case _:
                    pass

    def _node(self, end: int, depth: int) -> None:
        domain = operator = ""
        for field in self._reader.fields(end):
            match field.number, field.wire:
                case 4, 2:
                    operator = self._name(field)
                case 7, 2:
                    domain = self._name(field)
                case 5, 2:
                    self._attribute(field.value, depth)
                case _:
                    pass
        self._header.operators.add((domain, operator))
        if len(self._header.operators) > MAX_TENSORS:
            raise ValueError("too many kinds of operators")

    def _attribute(self, end: int, depth: int) -> None:
        num_listed = 0
        for field in self._reader.fields(end):
            match field.number, field.wire:
                case 5 | 10, 2:
                    self._tensor(field.value)
                case 6 | 11, 2:
                    self._graph(field.value, depth + 1)
                case 22 | 23, 2:
                    self._header.has_sparse = True
                case 7 | 8 | 9, _:
                    num_listed += 1
                    if num_listed > MAX_LISTED:  # a table of numbers, of a forest of trees say
                        return
                case _:
                    pass

    def _tensor(self, end: int) -> str:
        header = self._header
        header.num_tensors += 1
        if header.num_tensors > MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS:,} tensors")
        reader = self._reader
        name, data_type, raw_bytes, is_external = "", 0, -1, False
        dims: list[int] = []
        entries: dict[str, str] = {}
        for field in reader.fields(end):
            match field.number, field.wire:
                case 1, _:
                    dims.extend(reader.varints(field))
                    if len(dims) > 64 or any(size >= 2**63 for size in dims):
                        raise ValueError("a tensor's shape makes no sense")
                case 2, 0:
                    data_type = field.value
                case 8, 2:
                    name = self._name(field)
                case 9, 2:
                    raw_bytes = field.value - reader.at
                case 13, 2:
                    key, value = self._entry(field.value)
                    entries[key] = value
                case 14, 0:
                    is_external = field.value == 1
                case _:
                    pass
        num_bytes = -(-prod(dims) * BITS.get(data_type, 0) // 8)
        if data_type not in BITS and data_type != STRING:
            raise ValueError(f"the tensor {name[:80]!r} has an unknown type")
        if is_external or entries:
            self._external(name, entries, num_bytes)
        elif raw_bytes >= 0 and raw_bytes != num_bytes:
            raise ValueError(f"the tensor {name[:80]!r} has not the bytes that its shape needs")
        return name

    def _external(self, name: str, entries: dict[str, str], num_bytes: int) -> None:
        location = entries.get("location", "")
        numbers = [entries.get("offset", "0"), entries.get("length", str(num_bytes))]
        if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers):
            raise ValueError(f"the tensor {name[:80]!r} lies at no place of its file")
        if int(numbers[1]) != num_bytes:
            raise ValueError(f"the tensor {name[:80]!r} has not the bytes that its shape needs")
        external = self._header.external
        external[location] = max(external.get(location, 0), int(numbers[0]) + num_bytes)
        if len(external) > MAX_EXTERNAL_FILES:
            raise ValueError(f"its weights lie in more than {MAX_EXTERNAL_FILES:,} files")

    def _entry(self, end: int) -> tuple[str, str]:
        key = value = ""
        for field in self._reader.fields(end):
            if (field.number, field.wire) == (1, BYTES):
                key = self._name(field)
            elif (field.number, field.wire) == (2, BYTES):
                value = self._name(field)
        return key, value

    def _value(self, end: int) -> tuple[str, str]:
        name, kind = "", "tensor"
        for field in self._reader.fields(end):
            if (field.number, field.wire) == (1, BYTES):
                name = self._name(field)
            elif (field.number, field.wire) == (2, BYTES):
                kind = self._type(field.value)
        return name, kind

    def _type(self, end: int) -> str:
        kinds = {4: "sequence", 5: "map", 7: "opaque value", 8: "sparse tensor", 9: "optional"}
        kind = "tensor"
        for field in self._reader.fields(end):
            if (field.number, field.wire) == (1, BYTES):
                for inner in self._reader.fields(field.value):
                    if (inner.number, inner.wire, inner.value) == (1, VARINT, STRING):
                        kind = "string"
            else:
                kind = kinds.get(field.number, kind)
        return kind

    def _name(self, field: Field) -> str:
        return self._reader.text(field.value, MAX_TEXT_BYTES)
