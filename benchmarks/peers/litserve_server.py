"""One exported model behind LitServe, as its documentation has it, batching on.

    VENV/bin/python benchmarks/peers/litserve_server.py MODEL.{pt2,onnx} PORT

Runs in the peer's own environment, so it imports nothing of this project.
"""

import base64
import io
import sys
from pathlib import Path

import litserve
import numpy as np
import torch

MAX_BATCH_ROWS = 32
BATCH_SECONDS = 0.002
NUM_THREADS = 2


class Api(litserve.LitAPI):
    """`{"inputs": {name: nested list}}`, or `{"npy": base64}` for one large array."""

    def setup(self, device: str) -> None:
        torch.set_num_threads(NUM_THREADS)
        self.run = load(Path(sys.argv[1]))

    def decode_request(self, request: dict) -> list[np.ndarray]:
        if "npy" in request:
            return [np.load(io.BytesIO(base64.b64decode(request["npy"])))]
        return [np.array(v, dtype_of(name)) for name, v in request["inputs"].items()]

    def batch(self, inputs: list[list[np.ndarray]]) -> list[np.ndarray]:
        """Rows of other lengths are padded with zeros, as whoever wrote this for MiniLM would."""
        return [padded(column) for column in zip(*inputs, strict=True)]

    def predict(self, batch: list[np.ndarray]) -> np.ndarray:
        return self.run(batch)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return [output[index : index + 1] for index in range(len(output))]

    def encode_response(self, output: np.ndarray) -> dict:
        return {"outputs": {"output": output.tolist()}}


def load(path: Path):
    """The model as torch runs it, or ONNX Runtime."""
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = NUM_THREADS
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]
    module = torch.export.load(path).module()

    def run(arrays: list[np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return module(*map(torch.from_numpy, arrays)).numpy()

    return run


def dtype_of(name: str) -> type:
    return np.int64 if name in ("input_ids", "attention_mask") else np.float32


def padded(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    longest = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(a, ((0, 0), (0, longest - a.shape[1]))) for a in arrays])


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH_ROWS, batch_timeout=BATCH_SECONDS)
    server = litserve.LitServer(api, accelerator="cpu", timeout=600)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False)
