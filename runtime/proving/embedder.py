"""Proves an embedder: that a text's vector is the original's, whatever shares its run.

The original runs each text alone, in float64, and is pooled here once more, by formulas that know
nothing of batches. Which texts may share a run is what the proof finds, not what it assumes.
"""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.importing.embedder import Embedder, Normalize, first_line, load_embedder, load_encoder
from runtime.importing.embedder_layout import EmbedderLayout, read_layout
from runtime.importing.program import ImportFailure
from runtime.protocol import Batching, Check, Verdict
from runtime.proving.memory import available_bytes
from runtime.proving.original import TOLERANCE_FACTOR, TOLERANCE_FLOOR

logger = logging.getLogger(__name__)

# Lengths of the texts that are compared, in tokens: several of one length, and all mixed.
LENGTHS = (1, 2, 5, 5, 5, 17, 17, 33, 64)
LONGEST = 2048  # beyond it a text of full length is not run: attention's memory is its square

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class EmbedderProof:
    """`batching` is what texts may share a run. `unproved`: the original could not run here."""

    verdict: Verdict
    checks: list[Check]
    batching: Batching
    notes: list[str]


@dataclass(frozen=True)
class _Reference:
    """Exact vectors `[texts, dimensions]`. `tolerance_of` a dtype is the largest error that its own
    rounding explains."""

    texts: list[list[int]]
    vectors: Tensor
    tolerance_of: dict[torch.dtype, float]
    is_exact: bool  # computed in float64


def prove_embedder(
    directory: Path | str, embedder: Embedder, report: Report = lambda *_: None
) -> EmbedderProof:
    """Compare a loaded embedder with the directory it came from. Raises `ImportFailure` when the
    model does not run on what its configuration allows."""
    layout = read_layout(Path(directory))
    num_parameters = sum(parameter.numel() for parameter in embedder.module.parameters())
    free_bytes = available_bytes()
    if 5 * num_parameters > free_bytes:
        note = (
            f"Replaying the original in float32 needs about {5 * num_parameters / 1e9:.1f} GB; "
            f"{free_bytes / 1e9:.1f} GB are free. Build on a machine with more memory to prove "
            "it. Until then texts run one at a time."
        )
        return EmbedderProof("unproved", [], "alone", [note])
    _run_full_length(embedder)
    report(0.1, "running the original")
    reference = _consult(layout, embedder, has_float64=13 * num_parameters <= free_bytes)
    checks: list[Check] = []
    batching: Batching = "padded"
    for index, form in enumerate(_forms(Path(directory), embedder)):
        report(0.5 + 0.25 * index, f"comparing in {form.info.dtype}")
        found, allowed = _prove_form(form, reference)
        checks += found
        if _FREEDOM.index(allowed) < _FREEDOM.index(batching):
            batching = allowed
    notes = _notes(reference, batching, checks)
    is_equal = all(check.is_equal for check in checks if check.name.startswith("alone"))
    report(1.0, f"{sum(check.is_equal for check in checks)} of {len(checks)} checks hold")
    return EmbedderProof("equal" if is_equal else "different", checks, batching, notes)


_FREEDOM: tuple[Batching, ...] = ("alone", "equal_lengths", "padded")


def _forms(directory: Path, embedder: Embedder) -> list[Embedder]:
    """What is served, and the same in float32, where rounding hides no mistake."""
    if embedder.dtype == torch.float32:
        return [embedder]
    return [load_embedder(directory, embedder.device, torch.float32), embedder]


def _run_full_length(embedder: Embedder) -> None:
    """Positions that the tables lack show only here."""
    length = embedder.info.max_tokens
    if length > LONGEST:
        return
    try:
        vectors = embedder.embed([_random_text(embedder, length, torch.Generator())])
    # The model's own code runs here, on a configuration its owner wrote.
    except Exception as error:
        raise ImportFailure(
            "forward_failed",
            f"The model fails on a text of {length} tokens, which its configuration allows: "
            f"{first_line(error)}. Set max_seq_length in sentence_bert_config.json to what it "
            "takes.",
        ) from error
    if not vectors.isfinite().all():
        raise ImportFailure("not_finite", "The model gives NaN or infinity on ordinary tokens.")


# --- the original -----------------------------------------------------------------------


def _random_text(embedder: Embedder, length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(embedder.info.vocab_size, (length,), generator=generator).tolist()


def _consult(layout: EmbedderLayout, embedder: Embedder, *, has_float64: bool) -> _Reference:
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, embedder.info.max_tokens) for length in LENGTHS]
    texts = [_random_text(embedder, length, generator) for length in lengths]
    original, _ = load_encoder(layout.transformer, attention="eager", dtype=torch.float32)
    own = {torch.float32: _vectors(original, layout, embedder, texts)}
    if embedder.dtype not in own:
        served, _ = load_encoder(layout.transformer, attention="eager", dtype=embedder.dtype)
        own[embedder.dtype] = _vectors(served, layout, embedder, texts)
    exact = own[torch.float32]
    is_exact = False
    if has_float64:
        try:
            exact = _vectors(original.double(), layout, embedder, texts)
            is_exact = True
        except Exception:  # an operation without float64; whatever it raises
            logger.info("the original does not run in float64", exc_info=True)
    value_range = float(exact.max() - exact.min())
    tolerances = {
        dtype: max(TOLERANCE_FACTOR * _error(found, exact), TOLERANCE_FLOOR * value_range)
        for dtype, found in own.items()
    }
    return _Reference(texts, exact, tolerances, is_exact)


@torch.inference_mode()
def _vectors(
    original: PreTrainedModel, layout: EmbedderLayout, embedder: Embedder, texts: list[list[int]]
) -> Tensor:
    """One text at a time, with the mask of ones that a tokenizer gives."""
    takes_mask = "attention_mask" in inspect.signature(original.forward).parameters
    rows = []
    for text in texts:
        token_ids = torch.tensor([text])
        options = {"attention_mask": torch.ones_like(token_ids)} if takes_mask else {}
        states = original(input_ids=token_ids, **options).last_hidden_state[0]
        row = torch.cat([_pooled(states.double(), mode) for mode in layout.pooling])
        for step in embedder.head.steps:
            row = row / row.norm() if isinstance(step, Normalize) else _in_double(step, row)
        rows.append(row)
    return torch.stack(rows)


def _pooled(states: Tensor, mode: str) -> Tensor:
    """`[tokens, hidden]` of one text, without padding, to `[hidden]`."""
    num_tokens = len(states)
    match mode:
        case "cls":
            return states[0]
        case "last":
            return states[-1]
        case "max":
            return states.amax(0)
        case "mean":
            return states.mean(0)
        case "mean_sqrt_len_tokens":
            return states.sum(0) / math.sqrt(num_tokens)
        case "weightedmean":
            weights = torch.arange(1, num_tokens + 1, dtype=states.dtype)
            return weights @ states / weights.sum()
        case _:
            raise AssertionError(mode)


def _in_double(step: torch.nn.Module, row: Tensor) -> Tensor:
    linear, activation = step.get_submodule("0"), step.get_submodule("1")
    bias = getattr(linear, "bias", None)
    weight = linear.get_parameter("weight").cpu().double()
    product = weight @ row + (0.0 if bias is None else bias.cpu().double())
    return activation(product)


# --- the comparisons --------------------------------------------------------------------


def _prove_form(form: Embedder, reference: _Reference) -> tuple[list[Check], Batching]:
    """Alone, beside texts of the same length, and padded among longer ones."""
    label = form.info.dtype
    alone = _check(
        f"alone ({label})",
        "each text by itself",
        form,
        reference,
        [[i] for i in _indices(reference)],
    )
    equal = _check(
        f"equal lengths ({label})",
        "beside other texts of its length",
        form,
        reference,
        _groups(reference),
    )
    checks = [alone, equal]
    if not (alone.is_equal and equal.is_equal):
        return checks, "alone"
    everything = _indices(reference)
    padded = _check(
        f"padded ({label})",
        "padded beside texts of other lengths, in two orders",
        form,
        reference,
        [everything, everything[::-1], everything[:3]],
    )
    return [*checks, padded], "padded" if padded.is_equal else "equal_lengths"


def _indices(reference: _Reference) -> list[int]:
    return list(range(len(reference.texts)))


def _groups(reference: _Reference) -> list[list[int]]:
    by_length: dict[int, list[int]] = {}
    for index, text in enumerate(reference.texts):
        by_length.setdefault(len(text), []).append(index)
    return [group for group in by_length.values() if len(group) > 1]


def _check(
    name: str, what: str, form: Embedder, reference: _Reference, batches: Sequence[list[int]]
) -> Check:
    tolerance = reference.tolerance_of[form.dtype]
    detail = f"{what}; largest difference of a vector's number from the original in float64"
    worst = 0.0
    try:
        for batch in batches:
            found = form.embed([reference.texts[index] for index in batch])
            worst = max(worst, _error(found, reference.vectors[batch]))
    except Exception as error:  # what a stranger's model raises is an answer too
        logger.info("%s failed", name, exc_info=True)
        detail, worst = f"{what}: the model fails ({first_line(error)})", math.inf
    return Check(
        name=name,
        is_equal=worst <= tolerance,
        detail=detail,
        error=worst if math.isfinite(worst) else None,
        tolerance=tolerance,
    )


def _error(found: Tensor, exact: Tensor) -> float:
    """Infinite where one of them is not a number."""
    return float((found.double() - exact).abs().nan_to_num(nan=math.inf).max())


def _notes(reference: _Reference, batching: Batching, checks: list[Check]) -> list[str]:
    notes = []
    if not reference.is_exact:
        notes.append(
            "The original could not be run in float64 here (memory, or an operation without it); "
            "float32 was the reference, with the smallest tolerance."
        )
    if batching != "padded":
        failed = next(check for check in checks if not check.is_equal)
        how = "of equal lengths share runs" if batching == "equal_lengths" else "run one at a time"
        notes.append(f"Texts {how}: otherwise their vectors would change ({failed.name}).")
    return notes
