"""A real model finds its fastest form on a real box while it is called without a break."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy
import pytest

from tests.app.conftest import ADMIN_KEY
from tests.app.test_box import Box
from tests.runtime.importing.programs import export_digits

NUM_CALLERS = 2
PAUSE_SECONDS = 0.05  # of each, so that there is something left to measure with
MAX_SECONDS = 300  # only ends a broken test
TOLERANCE = 1e-4
IMAGES = numpy.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype("float32").tolist()


@pytest.fixture
def box(tmp_path: Path, database_url: str) -> Iterator[Box]:
    """Without a compiler, which would take a minute: the other forms take part."""
    box = Box(tmp_path / "data", database_url, TAPEOUT_OPTIMISE="1", PATH=str(tmp_path))
    yield box
    box.close()


class Traffic:
    """Calls without a break until told to stop. Keeps every answer."""

    def __init__(self, url: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.outputs: list[numpy.ndarray] = []
        self._url = url
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._call) for _ in range(NUM_CALLERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        with httpx.Client(headers=headers, timeout=60) as http:
            while not self._is_over.wait(PAUSE_SECONDS):
                answer = http.post(self._url, json={"inputs": {"image": IMAGES}})
                with self._lock:
                    self.statuses[answer.status_code] += 1
                    if answer.is_success:
                        output = next(iter(answer.json()["outputs"].values()))
                        self.outputs.append(numpy.asarray(output, dtype="float64"))


def test_it_is_optimised_while_it_is_called(box: Box, tmp_path: Path) -> None:
    program = export_digits(tmp_path / "digits.pt2")
    pushed = box.tapeout("push", program, "--name", "digits")
    assert pushed.returncode == 0, pushed.stderr
    assert "a faster form is looked for meanwhile" in pushed.stderr
    traffic = Traffic(f"{box.url}/models/digits/predict")
    traffic.start()
    try:
        path = "/api/models/digits/versions/1"
        box.wait(lambda: box.http.get(path).json()["optimisation"]["status"] == "done", MAX_SECONDS)
        version = box.http.get(path).json()
        form = version["optimisation"]["form"]
        box.wait(lambda: box.http.get(path).json()["serving_form"] == form, MAX_SECONDS)
        count = len(traffic.outputs)
        box.wait(lambda: len(traffic.outputs) > count + 20)
    finally:
        traffic.stop()
    # Nothing was lost on the way, everything was metered once, and the answers are the same.
    assert set(traffic.statuses) == {200}, traffic.statuses
    (row,) = box.http.get("/api/usage", params={"group_by": "model"}).json()["rows"]
    assert row["requests"] == traffic.statuses[200]
    first = traffic.outputs[0]
    assert all(abs(output - first).max() < TOLERANCE for output in traffic.outputs)
    receipt = box.http.get(f"{path}/receipt").json()
    chosen = [each["name"] for each in receipt["candidates"] if each["is_chosen"]]
    assert chosen == [form] == [version["manifest"]["form"]]
    assert {each["name"] for each in receipt["candidates"]} >= {"eager", "onnxruntime"}
    assert form in box.tapeout("models").stdout
