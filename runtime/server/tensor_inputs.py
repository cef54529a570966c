"""Makes the input tensors of a `Predict`, whatever it brings: tensors, an image or texts.

Owns the thread that images are decoded and texts tokenised on. How is `batching/images.py`'s and
`text/`'s; whether the tensors fit the schema is the batcher's to check.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from runtime.batching.images import image_row
from runtime.batching.tensors import PredictFailure, torch_dtype
from runtime.protocol import Predict, Schema, Tensor, TensorSpec

# Rows of one text, or of two, to the inputs that they become. May raise `PredictFailure`.
TextRows = Callable[[list[list[str]]], list[Tensor]]


class TensorInputs:
    """`text_rows` is that of a model which takes texts; it is called on a thread."""

    def __init__(self, schema: Schema, text_rows: TextRows | None = None) -> None:
        self._image = image_input(schema)
        self._text_rows = text_rows
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="inputs")

    async def tensors_of(self, predict: Predict) -> Sequence[Tensor]:
        """Raises `PredictFailure`. Tensors are returned as they came."""
        if predict.inputs is not None:
            return predict.inputs
        loop = asyncio.get_running_loop()
        if predict.texts is not None and self._text_rows is not None:
            return await loop.run_in_executor(self._executor, self._text_rows, predict.texts)
        if predict.image is not None and self._image is not None:
            row = await loop.run_in_executor(self._executor, image_row, predict.image, self._image)
            return [row]
        raise PredictFailure(
            "wrong_kind_of_input",
            "This model takes tensors only: no images, and no texts."
            if self._image is None and self._text_rows is None
            else "This model does not take that kind of input.",
        )

    def num_bytes(self, predict: Predict) -> int:
        """What the request holds of this process's memory until it is answered: what was
        received, and as much again for tensors, or the row that an image becomes."""
        if predict.inputs is not None:
            return 2 * sum(len(tensor.data) for tensor in predict.inputs)
        if predict.image is not None:
            row_bytes = 0 if self._image is None else _row_bytes(self._image)
            return len(predict.image) + 2 * row_bytes
        # A token of 8 bytes in each of three inputs for every byte of text.
        return sum(25 * len(text.encode()) for row in predict.texts or () for text in row)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def image_input(schema: Schema) -> TensorSpec | None:
    """The input that an image fills, where it is the only one."""
    if len(schema.inputs) == 1 and schema.inputs[0].image is not None:
        return schema.inputs[0]
    return None


def _row_bytes(spec: TensorSpec) -> int:
    return math.prod(size or 1 for size in spec.shape) * torch_dtype(spec.dtype).itemsize
