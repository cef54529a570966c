import math
from typing import Any

import msgspec
import pytest

from app.deployments.acceptance import (
    NotAcceptable,
    check_built,
    check_optimised,
    manifest_json,
    read_manifest,
    read_receipt,
    receipt_json,
)
from runtime.protocol import (
    Built,
    CandidateReport,
    Check,
    ImageInput,
    Manifest,
    Optimised,
    Schema,
    TensorSpec,
    TextInput,
)
from tests.app.deployments.fake_process import DECODER, EMBEDDER, RECEIPT, TENSOR

replace = msgspec.structs.replace


def decoder(**values: Any) -> Manifest:
    assert DECODER.decoder is not None
    return replace(DECODER, decoder=replace(DECODER.decoder, **values))


def embedder(**values: Any) -> Manifest:
    assert EMBEDDER.embedder is not None
    return replace(EMBEDDER, embedder=replace(EMBEDDER.embedder, **values))


def schema(*specs: TensorSpec) -> Manifest:
    return replace(TENSOR, schema=Schema(inputs=list(specs), outputs=[X], is_batched=False))


def candidate(**values: Any) -> CandidateReport:
    return CandidateReport(name="eager", is_chosen=True, reason="only one", **values)


X = TensorSpec(name="x", dtype="float32", shape=[None, 2])


@pytest.mark.parametrize(
    "manifest",
    [
        DECODER,
        EMBEDDER,
        TENSOR,
        schema(X, replace(X, name="y")),
        decoder(is_paged=False, num_layers=0, kv_bytes_per_token=0),  # a graph, uncached
    ],
)
def test_what_builds_report_is_kept_as_it_is(manifest: Manifest) -> None:
    receipt = replace(
        RECEIPT,
        checks=[Check(name="batch", is_equal=True, detail="é", error=0.1, tolerance=0.2)],
        candidates=[candidate(p50_ms={1: 0.5, 32: 3.0}, device_ms_max=4.0)],
    )
    check_built(Built(manifest=manifest, receipt=receipt))
    stored = msgspec.json.decode(
        msgspec.json.encode([manifest_json(manifest), receipt_json(receipt)])
    )
    assert read_manifest(stored[0]) == manifest
    assert read_receipt(stored[1]) == receipt


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (decoder(vocab_size=0), "implausible"),
        (decoder(max_context_tokens=10**12), "implausible"),
        (decoder(num_embedded_ids=10**6), "implausible"),
        (decoder(num_layers=0), "implausible"),
        (decoder(template_tokens=-1), "implausible"),
        (decoder(template_tokens_per_message=10**6), "implausible"),
        (decoder(architecture="\x1b[2J"), "control characters"),
        (decoder(architecture="x" * 10_000), "overlong"),
        (decoder(kv_bytes_per_token=2**60), "out of range"),
        (replace(DECODER, decoder=None), "lacks the description"),
        (replace(DECODER, weight_bytes=-1), "negative size"),
        (embedder(dimensions=0), "implausible"),
        (embedder(dimensions=10**9), "implausible"),
        (embedder(max_tokens=0), "implausible"),
        (embedder(special_tokens=-1), "implausible"),
        (embedder(matryoshka_dimensions=[1, 3]), "implausible"),
        (replace(EMBEDDER, embedder=None), "lacks the description"),
        (replace(TENSOR, schema=None), "lacks the schema"),
        (schema(), "no tensors"),
        (schema(X, X), "one twice"),
        (schema(replace(X, shape=[-1])), "negative size"),
        (schema(replace(X, min_shape=[1])), "do not agree"),
        (schema(replace(X, shape=[1] * 40)), "do not agree"),
        (schema(*[replace(X, name=f"x{n}") for n in range(300)]), "too many"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_implausible_manifests_are_refused(manifest: Manifest, words: str) -> None:
    with pytest.raises(NotAcceptable, match=words):
        check_built(Built(manifest=manifest, receipt=RECEIPT))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"verdict": "different"}, "answers differently"),
        ({"phase_seconds": {"import": math.nan}}, "not finite"),
        ({"phase_seconds": {"import": -1.0}}, "negative durations"),
        ({"candidates": [candidate(device_ms_max=math.inf)]}, "not finite"),
        ({"candidates": [candidate(device_ms_max=-1.0)]}, "negative durations"),
        ({"candidates": [candidate(row_ms_by_size={8: math.inf})]}, "not finite"),
        ({"candidates": [candidate(row_ms_by_size={8: -1.0})]}, "negative durations"),
        ({"candidates": [candidate(row_ms_by_size={0: 1.0})]}, "sizes of rows"),
        ({"candidates": [candidate(row_ms_by_size=dict.fromkeys(range(1, 40), 1.0))]}, "sizes of"),
        ({"notes": ["x" * 8000] * 1000}, "too large"),
    ],
    ids=str,
)
def test_implausible_receipts_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(NotAcceptable, match=words):
        check_built(Built(manifest=DECODER, receipt=replace(RECEIPT, **values)))


def test_texts_of_a_receipt_are_made_harmless() -> None:
    receipt = replace(RECEIPT, notes=["\x1b[31mred\x00", "\ud800", "x" * 9000])
    check_built(Built(manifest=DECODER, receipt=receipt))
    notes = receipt_json(receipt)["notes"]
    assert notes[:2] == ["red�", "?"]
    assert len(notes[2]) == 8192


# --- optimisations ----------------------------------------------------------------------

BUILT = replace(TENSOR, environment="")
QUICK = replace(TENSOR, form="quick", environment="here")


def optimised(manifest: Manifest = QUICK, verdict: Any = "equal", **values: Any) -> Optimised:
    """Whose form was chosen, with these values of its candidate."""
    reports = [
        replace(candidate(), is_chosen=manifest.form == "eager"),
        *([] if manifest.form == "eager" else [replace(candidate(), name=manifest.form, **values)]),
    ]
    return Optimised(
        manifest=manifest, receipt=replace(RECEIPT, verdict=verdict, candidates=reports)
    )


def test_a_form_of_what_was_built_is_accepted() -> None:
    measured = {"p50_ms": {1: 0.5}, "p99_ms": {1: 0.6}, "num_runs": 20, "memory_bytes": 1}
    check_optimised(optimised(fate="chosen", error=0.1, **measured), BUILT, False)
    check_optimised(optimised(BUILT), QUICK, False)  # eager again
    check_optimised(optimised(verdict="lossy", top_1_agreement=0.99), BUILT, True)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (optimised(replace(QUICK, num_parameters=11)), "another program"),
        (optimised(replace(QUICK, labels=["cat"])), "another program"),
        (optimised(replace(QUICK, form="a/b")), "no name"),
        (optimised(replace(QUICK, form="")), "no name"),
        (optimised(replace(QUICK, environment="")), "where its form holds"),
        (optimised(is_chosen=False), "was chosen"),
        (optimised(verdict="lossy"), "not allowed"),
        (optimised(verdict="different"), "answers differently"),
        (optimised(fate="slower"), "chosen and not chosen"),
        (optimised(p99_ms={1: -1.0}), "negative durations"),
        (optimised(prepare_seconds=-1.0), "negative durations"),
        (optimised(rows_per_second={1: math.inf}), "not finite"),
        (optimised(p50_ms={0: 1.0}), "batch sizes"),
        (optimised(memory_bytes=-1), "less than nothing"),
        (optimised(num_runs=-1), "less than nothing"),
        (optimised(error=-0.1), "less than nothing"),
        (optimised(top_1_agreement=1.5), "share of rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_result_that_cannot_be_is_refused(result: Optimised, words: str) -> None:
    with pytest.raises(NotAcceptable, match=words):
        check_optimised(result, BUILT, False)


IMAGE = ImageInput(height=4, width=6, channels=3, is_channels_first=True)
PIXELS = TensorSpec(name="x", dtype="float32", shape=[None, 3, 4, 6])
IDS = TensorSpec(name="ids", dtype="int64", shape=[None, None])


def batched(*specs: TensorSpec, **values: Any) -> Manifest:
    made = Schema(inputs=list(specs), outputs=[X], is_batched=True)
    return replace(TENSOR, schema=made, **values)


@pytest.mark.parametrize(
    "manifest",
    [
        batched(replace(PIXELS, image=IMAGE, minimum=0.0, maximum=1.0)),
        batched(replace(PIXELS, shape=[None, 3, None, None], image=IMAGE)),
        batched(
            replace(IDS, padded_axis=1),
            text=TextInput(max_tokens=8, takes_pairs=False, token_ids="ids"),
            labels=["yes", "no"],
        ),
    ],
)
def test_what_a_schema_says_beyond_shapes(manifest: Manifest) -> None:
    check_built(Built(manifest=manifest, receipt=RECEIPT))


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (batched(replace(PIXELS, minimum=1.0, maximum=0.0)), "range without values"),
        (batched(replace(PIXELS, name="")), "has no name"),
        (batched(replace(PIXELS, name="x" * 1_001)), "too long"),
        (batched(replace(PIXELS, image=replace(IMAGE, height=5))), "do not fit"),
        (batched(replace(PIXELS, image=replace(IMAGE, channels=2))), "there is not"),
        (batched(replace(PIXELS, image=replace(IMAGE, std=[0.0] * 3))), "there is not"),
        (batched(replace(PIXELS, image=replace(IMAGE, mean=[0.5]))), "there is not"),
        (batched(replace(IDS, padded_axis=0)), "padded along"),
        (batched(replace(IDS, padded_axis=2)), "padded along"),
        (batched(replace(PIXELS, padded_axis=2)), "padded along"),
        (batched(replace(IDS, padded_axis=1, longest_padded=0)), "implausible length"),
        (batched(replace(IDS, longest_padded=9)), "implausible length"),
        (
            batched(IDS, text=TextInput(max_tokens=8, takes_pairs=False, token_ids="other")),
            "does not have",
        ),
        (
            batched(IDS, text=TextInput(max_tokens=0, takes_pairs=False, token_ids="ids")),
            "implausible length",
        ),
    ],
)
def test_a_schema_that_cannot_be_is_refused(manifest: Manifest, words: str) -> None:
    with pytest.raises(NotAcceptable, match=words):
        check_built(Built(manifest=manifest, receipt=RECEIPT))
