"""The graph that compilers are given: in a form's precision, with tensors as its only results."""

import copy
import dataclasses

from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.utils import _pytree as pytree

from runtime.compiling.forms.form import FormFailure
from runtime.compiling.forms.precisions import in_precision
from runtime.importing.tensor_program import TensorProgram


def graph_of(program: TensorProgram, precision: str) -> ExportedProgram:
    """The graph of an upload; the uploaded one stays as it is. Raises `FormFailure`."""
    if program.program is None:
        raise FormFailure("The program has no graph that torch can compile.")
    return _tensor_results(in_precision(program.program, precision))


def _tensor_results(program: ExportedProgram) -> ExportedProgram:
    """Results that were fixed at export are left out: neither wire nor compilers know them."""
    signature = program.graph_signature
    is_kept = [isinstance(spec.arg, TensorArgument) for spec in signature.output_specs]
    if all(is_kept):
        return program
    graph_module = copy.copy(program.graph_module)
    graph_module.graph = copy.deepcopy(program.graph)
    output = graph_module.graph.output_node()
    results = output.args[0]
    assert isinstance(results, (tuple, list)), "an exported graph returns a flat tuple"
    output.args = (tuple(value for value, kept in zip(results, is_kept, strict=True) if kept),)
    graph_module.recompile()
    specs = [spec for spec, kept in zip(signature.output_specs, is_kept, strict=True) if kept]
    whole, *others = program.module_call_graph
    assert whole.signature is not None, "the first entry is the program's own"
    # Flat: what was dropped had a place in the structure.
    flat = pytree.tree_structure((0,) * len(specs))
    entry = dataclasses.replace(
        whole,
        signature=dataclasses.replace(
            whole.signature, outputs=[spec.arg for spec in specs], out_spec=flat
        ),
    )
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=dataclasses.replace(signature, output_specs=specs),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=[entry, *others],
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
