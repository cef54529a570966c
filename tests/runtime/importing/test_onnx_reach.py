"""ONNX graphs whose answers are always the same are found by their structure."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from runtime.importing.onnx.reach import check_reach
from runtime.importing.program import ImportFailure
from tests.runtime.importing.onnx_files import FLOAT, WEIGHT, graph, linear, node

ENDS = ({"x": (FLOAT, ["batch", 4])}, {"y": (FLOAT, [4, 3])})


def test_an_answer_that_no_input_reaches_is_refused() -> None:
    nodes = [node("Relu", "x", "lost"), node("Relu", "w", "y")]
    with pytest.raises(ImportFailure) as caught:
        check_reach(graph(nodes, *ENDS, {"w": WEIGHT}))
    assert caught.value.error.code == "constant_output"


def test_inputs_reach_outputs_through_branches() -> None:
    check_reach(linear())
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([node("Relu", "x", "inner")], "branch", [], [value])
    choice = node("If", "yes", "y", then_branch=branch, else_branch=branch)
    check_reach(graph([choice], *ENDS, {"yes": np.array(True)}))
