"""The description of a TorchScript module's inputs: what owner and examples say, joined.

The file itself says only names. Without more, the owner is asked, and shown the very line.
"""

from collections.abc import Sequence

import torch

from runtime.importing.examples import Arrays, pick_arrays
from runtime.importing.program import ImportFailure
from runtime.importing.signature import WIRE_DTYPES
from runtime.importing.torchscript.arguments import Argument, missing_names, order_names
from runtime.importing.torchscript.guessing import guess_input
from runtime.protocol import BuildHints, InputHint

BATCH = "batch"


def describe_inputs(
    module: torch.jit.ScriptModule,
    arguments: Sequence[Argument],
    hints: BuildHints,
    examples: Arrays | None,
) -> list[InputHint]:
    """One description per input, in the order of the call. Raises `ImportFailure`, whose code is
    `needs_inputs` where too little is known."""
    said = list(hints.inputs)
    if hints.is_remembered and not _fit(arguments, said):
        said = []
    found = {hint.name: hint for hint in said}
    if examples is not None:
        names = [hint.name for hint in said] or _example_names(arguments, examples)
        order = order_names(arguments, names)
        arrays = dict(zip(order, pick_arrays(examples, order), strict=True))
        for hint in _of_examples(arrays):
            found.setdefault(hint.name, hint)
    names = order_names(arguments, list(found))
    if missing := missing_names(arguments, names):
        raise needs_inputs(module, arguments, missing, is_partly_said=bool(found))
    return [found[name] for name in names]


def needs_inputs(
    module: torch.jit.ScriptModule,
    arguments: Sequence[Argument],
    missing: Sequence[str],
    *,
    is_partly_said: bool = False,
) -> ImportFailure:
    """Asks for the inputs. Its indented lines are what to say, guessed as far as the weights
    show it."""
    lines = "\n".join(f"    {guess_input(module, name).text}" for name in missing)
    optional = [argument.name for argument in arguments if argument.kind == "optional"]
    left_out = f" ({', '.join(optional)} may be left out.)" if optional else ""
    what = "Still missing" if is_partly_said else "A TorchScript file does not say"
    names = ", ".join(missing[:8])
    return ImportFailure(
        "needs_inputs",
        f"{what}: the dtypes and shapes of its inputs ({names}).{left_out} Say them and build "
        "again, with a name where a size may vary and `batch` for the rows of a request. With "
        f"the sizes of your model, these lines:\n{lines}\n"
        "In the console they go into the form below; `tapeout push` takes them as --inputs "
        '"..." (parted by ;), or real inputs as --example FILE.npz.',
        param="inputs",
    )


def _fit(arguments: Sequence[Argument], hints: Sequence[InputHint]) -> bool:
    return all(any(argument.owns(hint.name) for argument in arguments) for hint in hints)


def _example_names(arguments: Sequence[Argument], examples: Arrays) -> list[str]:
    """The inputs that the arrays are of: their own names, or those of forward in its order."""
    if list(examples) != [f"arr_{index}" for index in range(len(examples))]:
        return list(examples)
    names = [name for argument in arguments for name in argument.least_names]
    optional = [argument.name for argument in arguments if argument.kind == "optional"]
    return (names + optional)[: max(len(names), len(examples))]


def _of_examples(arrays: Arrays) -> list[InputHint]:
    """The first axis is the batch where all arrays agree on it; the others are as they are."""
    rows = {tensor.shape[0] if tensor.dim() else None for tensor in arrays.values()}
    has_batch = len(rows) == 1 and rows != {None}
    return [
        InputHint(
            name=name,
            dtype=WIRE_DTYPES[tensor.dtype],
            axes=[BATCH, *tensor.shape[1:]] if has_batch else list(tensor.shape),
        )
        for name, tensor in arrays.items()
    ]
