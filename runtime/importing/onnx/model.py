"""A tensor program that ONNX Runtime runs, node by node as it was uploaded.

Only ever loaded inside a sandboxed build or worker. What may be in the file is `reading.py`'s,
names and axes are `signature.py`'s, the exact form that rounding is measured against is
`float64.py`'s.
"""

from pathlib import Path

import torch
from torch.export import ExportedProgram

from runtime.importing.onnx.float64 import Float64Evaluator
from runtime.importing.onnx.reading import read_onnx
from runtime.importing.onnx.session import make_session, run_session
from runtime.importing.onnx.signature import read_onnx_signature
from runtime.importing.onnx.tensors import is_external, place_of, tensors_of
from runtime.importing.onnx.weights import count_weights, read_weights
from runtime.importing.signature import Signature
from runtime.importing.tensor_program import MAX_REFERENCE_BYTES
from runtime.protocol import Schema


class OnnxModel:
    """A loaded ONNX file. `onnx_path` is where it lies, `locations` where its other files do,
    relative to its directory."""

    program: ExportedProgram | None = None
    example_inputs: list[torch.Tensor] | None = None

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        model = read_onnx(path)
        self.onnx_path = path
        self.signature: Signature = read_onnx_signature(model)
        self.schema: Schema = self.signature.schema
        self.notes: list[str] = [self.signature.batch_note] if self.signature.batch_note else []
        self.num_parameters, self.weight_bytes = count_weights(model)
        self.locations = sorted({place_of(t).location for t in tensors_of(model) if is_external(t)})
        del model  # the session has its own
        self._session = make_session(path, device=device, num_threads=torch.get_num_threads())
        self._state: dict[str, torch.Tensor] | None = None
        self._float64: Float64Evaluator | None = None
        self._names = [spec.name for spec in self.schema.inputs]
        self._output_names = [spec.name for spec in self.schema.outputs]
        self._dtypes = [leaf.dtype for leaf in self.signature.inputs]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The weights as the file has them, read when first asked for: the session holds copies of
        its own."""
        if self._state is None:
            self._state = read_weights(read_onnx(self.onnx_path), self.onnx_path.parent)
        return self._state

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs on the CPU in their wire dtypes. Raises `OnnxRunError`."""
        tensors = [tensor.to(dtype) for tensor, dtype in zip(inputs, self._dtypes, strict=True)]
        outputs = run_session(self._session, self._names, tensors, self._output_names)
        return [
            output.to(getattr(torch, spec.dtype))
            for output, spec in zip(outputs, self.schema.outputs, strict=True)
        ]

    def run_float64(self, batches: list[list[torch.Tensor]]) -> list[list[torch.Tensor]] | None:
        """What the graph gives in float64; None when it is too large, takes too long, or has an
        operator without such a form."""
        if self.weight_bytes > MAX_REFERENCE_BYTES:
            return None
        if self._float64 is None:
            self._float64 = Float64Evaluator(self.onnx_path)
        feeds = [dict(zip(self._names, inputs, strict=True)) for inputs in batches]
        return self._float64.run(self._output_names, feeds)


def load_onnx(path: Path, *, device: str = "cpu") -> OnnxModel:
    """The model of a file as it is. Raises `ImportFailure`."""
    return OnnxModel(path, device=device)
