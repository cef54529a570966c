"""Times an embedder's runs as serving makes them."""

from collections.abc import Callable

import torch

from runtime.compiling.measuring import measure
from runtime.importing.embedder import Embedder
from runtime.protocol import CandidateReport

BATCH_SIZES = (1, 8, 32)
TEXT_TOKENS = 64
RUN_TOKENS = 1024  # as `Serve.max_batch_tokens`: the largest run that serving makes of short texts

Report = Callable[[float, str], None]


def measure_embedder(embedder: Embedder, report: Report = lambda *_: None) -> list[CandidateReport]:
    """Runs of several texts of one length, and the longest run there is."""
    sizes = BATCH_SIZES if embedder.info.batching != "alone" else (1,)
    length = min(TEXT_TOKENS, embedder.info.max_tokens)
    p50_ms: dict[int, float] = {}
    for index, size in enumerate(sizes):
        p50_ms[size] = round(_p50_ms(embedder, [[0] * length] * size), 4)
        line = f"eager, {size} texts of {length} tokens: {p50_ms[size]:.2f} ms"
        report((index + 1) / (len(sizes) + 1), line)
    longest = min(RUN_TOKENS, embedder.info.max_tokens)
    num_texts = 1 if embedder.info.batching == "alone" else max(1, RUN_TOKENS // longest)
    longest_ms = _p50_ms(embedder, [[0] * longest] * num_texts)
    report(1.0, f"eager, {num_texts} texts of {longest} tokens: {longest_ms:.1f} ms")
    return [
        CandidateReport(
            name="eager",
            is_chosen=True,
            reason=f"the model as uploaded, and the only form measured; texts of {length} tokens",
            p50_ms=p50_ms,
            device_ms_max=max(longest_ms, *p50_ms.values()),
        )
    ]


def _p50_ms(embedder: Embedder, texts: list[list[int]]) -> float:
    def run(_: list[torch.Tensor]) -> list[torch.Tensor]:
        return [embedder.embed(texts)]

    return measure({"eager": run}, [], budget_seconds=0.5)["eager"].p50_ms
