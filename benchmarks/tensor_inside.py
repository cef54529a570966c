"""A tensor benchmark's model run in process, without a server: eager, Inductor, ONNX Runtime.

    python -m benchmarks.tensor_inside MODEL WORK_DIR

Also writes the `.onnx` that the peers run. Prints one line of JSON: milliseconds (median) of a
run by engine and rows.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from benchmarks.tensor_models import WORKLOADS

ROWS = (1, 8, 32)
NUM_THREADS = 2
ROUNDS = 30
SECONDS = 6.0  # for each number of rows

Run = Callable[[list[np.ndarray]], object]


def main() -> None:
    workload, work_dir = WORKLOADS[sys.argv[1]], Path(sys.argv[2])
    torch.set_num_threads(NUM_THREADS)
    path = workload.export(work_dir)
    onnx_path = path.with_suffix(".onnx")
    program = torch.export.load(path)
    if not onnx_path.exists():
        made = torch.onnx.export(program, (), dynamo=True, verbose=False)
        assert made is not None, "the program is exported in memory"
        made.save(str(onnx_path))
    module = program.module()
    runs: dict[str, Run] = {
        "eager": by_torch(module),
        "Inductor": by_torch(torch.compile(module, dynamic=False)),
        "ONNX Runtime": by_onnxruntime(onnx_path),
    }
    found: dict[str, dict[int, float]] = {name: {} for name in runs}
    for rows in ROWS:
        arrays = list(workload.requests(rows)[0].values())
        for name, milliseconds in interleaved(runs, arrays).items():
            found[name][rows] = round(statistics.median(milliseconds), 4)
    print(json.dumps(found))


def interleaved(runs: dict[str, Run], arrays: list[np.ndarray]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(arrays)
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline or len(times["eager"]) < ROUNDS // 10:
        for name, run in runs.items():
            started = time.perf_counter()
            run(arrays)
            times[name].append((time.perf_counter() - started) * 1e3)
    return times


def by_torch(module: torch.nn.Module) -> Run:
    def run(arrays: list[np.ndarray]) -> object:
        with torch.inference_mode():
            return module(*map(torch.from_numpy, arrays))

    return run


def by_onnxruntime(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = NUM_THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


if __name__ == "__main__":
    main()
