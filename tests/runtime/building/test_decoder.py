"""Which way a decoder is served: the first that is proved, with what was wrong with the others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.building.deadline import within
from runtime.building.decoder import build_decoder
from runtime.building.directory_routes import directory_source
from runtime.building.routes import NotThisWay, Route, Served, Source
from runtime.execution.runner import Attend
from runtime.importing.archive import UnpackedUpload
from runtime.importing.huggingface import HuggingFaceDecoder, load_decoder
from runtime.importing.program import ImportFailure
from runtime.proving.forms import PagedForm, Run, paged_form
from runtime.proving.original import Trace
from tests.runtime.decoders import save_decoder


class Log:
    """Stands in for a `Reporter`."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[float, str], None]]:
        yield lambda _, detail: self.lines.append(f"{name}: {detail}")


class OffByOne(HuggingFaceDecoder):
    def forward(
        self, token_ids: Tensor, positions: Tensor, sample_indices: Tensor, attend: Attend
    ) -> Tensor:
        return super().forward(token_ids, positions * 2, sample_indices, attend)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    save_decoder("llama", tmp_path / "model")
    source = directory_source(UnpackedUpload(kind="huggingface", path=tmp_path / "model"), tmp_path)

    def no_fused_form(_: Served) -> Served:
        raise NotThisWay("it has no fused form.")

    return replace(source, routes=source.routes[:1], fuse=no_fused_form)


def faulty(source: Source) -> Route:
    """Serves the model a little wrong."""

    def load(_: str) -> Served:
        served = source.routes[0].load("")
        directory = source.upload.path

        def load_wrong(dtype: torch.dtype | None = None) -> OffByOne:
            decoder: Any = load_decoder(directory, dtype=dtype)
            decoder.__class__ = OffByOne
            return decoder

        decoder = load_wrong()
        return replace(served, decoder=decoder, form=paged_form(decoder, load_wrong))

    return Route("a faulty way", load)


def test_a_way_that_differs_gives_way_loudly(source: Source) -> None:
    log: Any = Log()
    outcome = build_decoder(replace(source, routes=[faulty(source), *source.routes]), log)
    assert outcome.verdict == "equal"
    assert all(check.is_equal for check in outcome.checks)
    assert outcome.notes[0].startswith("Not served by a faulty way: That form does not compute")
    assert any(line.startswith("prove: different") for line in log.lines)


def test_a_way_whose_proof_fails_to_run_gives_way_loudly(source: Source) -> None:
    def load(_: str) -> Served:
        def fail(_: torch.dtype) -> HuggingFaceDecoder:
            raise IndexError("index 100 is out of range\nof a table")

        served = source.routes[0].load("")
        assert isinstance(served.form, PagedForm)
        return replace(served, form=replace(served.form, load=fail))

    log: Any = Log()
    outcome = build_decoder(replace(source, routes=[Route("odd code", load), *source.routes]), log)
    assert outcome.verdict == "equal"
    failure = "That form fails when it runs (IndexError: index 100 is out of range)."
    assert outcome.notes[0] == f"Not served by odd code: {failure}"


def test_a_way_is_replayed_on_prompts_that_fit_it(source: Source) -> None:
    def load(_: str) -> Served:
        served = faulty(source).load("")
        assert isinstance(served.form, PagedForm)
        return replace(served, form=replace(served.form, window=100))

    class ShortForm(PagedForm):
        def runs(self, dtype: torch.dtype, traces: list[Trace]) -> list[Run]:
            assert max(len(trace.tokens) for trace in traces) <= self.max_context_tokens
            return super().runs(dtype, traces)

    def load_short(_: str) -> Served:
        served = source.routes[0].load("")
        form = ShortForm(**{**vars(served.form), "max_context_tokens": 24})
        return replace(served, form=form)

    log: Any = Log()
    routes = [Route("a long context", load), Route("a short one", load_short)]
    outcome = build_decoder(replace(source, routes=routes), log)
    assert outcome.verdict == "equal"
    assert outcome.notes[0].startswith("Not served by a long context: That form does not")


def test_a_fused_form_that_cannot_be_made_is_a_noted_loss(source: Source) -> None:
    log: Any = Log()
    eager, fused = build_decoder(source, log).candidates
    assert eager.is_chosen
    assert (fused.is_chosen, fused.reason) == (False, "not made: it has no fused form.")


def test_a_fused_form_that_differs_is_not_served(source: Source) -> None:
    log: Any = Log()
    wrong = faulty(source)

    def fuse(_: Served) -> Served:
        served = wrong.load("")
        assert served.decoder is not None
        decoder = served.decoder
        return replace(served, form=paged_form(decoder, lambda _: decoder, name="fused"))

    outcome = build_decoder(replace(source, fuse=fuse), log)
    assert outcome.verdict == "equal"
    assert outcome.manifest.form == "eager"
    assert not any(check.is_equal for check in outcome.checks if check.form == "fused, float32")
    assert "its proof failed" in outcome.candidates[1].reason


def test_a_model_that_no_way_serves_is_refused_with_all_reasons(source: Source) -> None:
    def refuse(_: str) -> Served:
        raise NotThisWay("it is odd.")

    routes = [Route("one way", refuse), faulty(source)]
    log: Any = Log()
    with pytest.raises(ImportFailure, match=r"one way: it is odd\. .* a faulty way: That form"):
        build_decoder(replace(source, routes=routes), log)


def test_what_takes_too_long_ends() -> None:
    def spin() -> None:
        try:
            while True:
                pass
        except Exception:  # noqa: BLE001, S110 - as code in between may do
            pass

    with pytest.raises(TimeoutError, match="waiting took longer"), within(0.05, "waiting"):
        spin()
