"""Tells the outputs of an ONNX graph that no input can change, by its structure alone."""

from collections.abc import Iterator

from onnx import GraphProto, ModelProto, NodeProto

from runtime.importing.onnx.reading import real_inputs
from runtime.importing.soundness import constant_failure


def check_reach(model: ModelProto) -> None:
    """Raises `ImportFailure` if no input reaches any output. Random operators count as inputs:
    what they give is for the proof to judge."""
    reached = {value.name for value in real_inputs(model)}
    for node in model.graph.node:  # sorted: a value is made before it is read
        if "Random" in node.op_type or not reached.isdisjoint(_read(node)):
            reached.update(node.output)
    outputs = [value.name for value in model.graph.output]
    if reached.isdisjoint(outputs):
        raise constant_failure(outputs)


def _read(node: NodeProto) -> Iterator[str]:
    """The names that a node reads, in its branches and loop bodies too."""
    yield from node.input
    for attribute in node.attribute:
        graphs: list[GraphProto] = [*attribute.graphs]
        if attribute.HasField("g"):
            graphs.append(attribute.g)
        for graph in graphs:
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from _read(inner)
