"""Traffic on a whole box, and what its books say meanwhile."""

import threading
from typing import Any

import httpx


def compare(box: Any) -> dict[str, dict[str, Any]]:
    """Has the box compare its books; by check."""
    answer = box.http.post("/api/reconciliation/")
    assert answer.status_code == 200, answer.text
    return {check["name"]: check for check in answer.json()["checks"]}


def differences(checks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: c["differences"] for name, c in checks.items() if c["num_differences"]}


class Traffic:
    """Completions, some of which their callers leave, and predictions."""

    def __init__(self, box: Any) -> None:
        self._box = box
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(work,))
            for work in (self._complete, self._complete, self._leave, self._predict)
        ]
        self.num_done = 0

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, work: Any) -> None:
        headers = dict(self._box.http.headers)
        with httpx.Client(base_url=self._box.url, headers=headers, timeout=60) as http:
            while not self._is_over.is_set():
                work(http)
                self.num_done += 1

    def _complete(self, http: httpx.Client) -> None:
        body = {"model": "tiny-llama", "prompt": [5, 6, 7] * 30, "max_tokens": 9, "n": 2}
        assert http.post("/v1/completions", json=body).status_code == 200

    def _leave(self, http: httpx.Client) -> None:
        body = {
            "model": "tiny-llama",
            "prompt": [9] * 40,
            "max_tokens": 200,
            "stream": True,
            "ignore_eos": True,
        }
        with http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_raw())

    def _predict(self, http: httpx.Client) -> None:
        image = [[[[0.5] * 8] * 8]]
        body = {"inputs": {"image": image}}
        assert http.post("/models/digits/predict", json=body).status_code == 200
