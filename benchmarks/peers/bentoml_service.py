"""One exported model behind BentoML, as its documentation has it, adaptive batching on.

    MODEL=MODEL.{pt2,onnx} VENV/bin/bentoml serve bentoml_service:Service --port PORT

Runs in the peer's own environment, so it imports nothing of this project.
"""

import os
from pathlib import Path

import bentoml
import numpy as np
import torch
from litserve_server import NUM_THREADS, dtype_of, load, padded

MAX_BATCH_ROWS = 32
MAX_LATENCY_MS = 60_000  # beyond it BentoML refuses requests


@bentoml.service(workers=1, traffic={"timeout": 600})
class Service:
    """One parameter only: that is what BentoML batches. MiniLM's mask follows from its ids."""

    def __init__(self) -> None:
        torch.set_num_threads(NUM_THREADS)
        self.run = load(Path(os.environ["MODEL"]))

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_ROWS, max_latency_ms=MAX_LATENCY_MS)
    def predict(self, image: np.ndarray) -> np.ndarray:
        return self.run([np.asarray(image, np.float32)])

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_ROWS, max_latency_ms=MAX_LATENCY_MS)
    def encode(self, input_ids: list[list[int]]) -> list[list[float]]:
        rows = tuple(np.array([row], dtype_of("input_ids")) for row in input_ids)
        ids = padded(rows)
        return self.run([ids, (ids != 0).astype(np.int64)]).tolist()
