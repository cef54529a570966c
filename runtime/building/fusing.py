"""Whether a decoder's fused form is served: proved first, then measured beside the eager one.

A fused form that cannot be made, or differs, is a noted loss and never a failed build.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from runtime.building.deadline import within
from runtime.building.reporter import Reporter
from runtime.building.routes import NotThisWay, Served
from runtime.protocol import CandidateReport, Check, Verdict
from runtime.proving.decoder import DecoderProver, available_bytes
from runtime.proving.forms import WholeForm
from runtime.proving.speed import measure_decoders, measure_whole

logger = logging.getLogger("runtime.build")

FUSE_SECONDS = 600.0  # for making and proving the fused form
MEMORY_FACTOR = 3  # times the weights: a graph, its packed weights and the original meanwhile


@dataclass(frozen=True)
class Chosen:
    """The form to serve; `checks` and `notes` are about the others that were tried."""

    served: Served
    candidates: list[CandidateReport]
    checks: list[Check]
    notes: list[str]


def choose_form(
    eager: Served,
    verdict: Verdict,
    prover: DecoderProver,
    fuse: Callable[[Served], Served],
    reporter: Reporter,
) -> Chosen:
    """The fastest of the forms that are proved. `verdict` is of the eager one."""
    if eager.decoder is None:
        assert eager.whole is not None, "a decoder is paged or whole"
        assert isinstance(eager.form, WholeForm), "a whole model has a whole form"
        with reporter.phase("measure") as report:
            candidate = measure_whole(
                eager.form.name,
                eager.whole,
                eager.info.max_context_tokens,
                report,
                is_batched=eager.form.is_batched,
            )
        return Chosen(eager, [candidate], [], [])
    fused, checks, loss = _prove_fused(eager, verdict, prover, fuse, reporter)
    forms = {"eager": eager.decoder}
    if fused is not None:
        assert fused.decoder is not None, "a fused form is paged"
        forms["fused"] = fused.decoder
    with reporter.phase("measure") as report:
        candidates = measure_decoders(forms, report)
    if loss:
        lost = CandidateReport(name="fused", is_chosen=False, reason=loss)
        candidates = [*candidates, lost]
    is_fused = any(each.is_chosen and each.name == "fused" for each in candidates)
    served = fused if fused is not None and is_fused else eager
    return Chosen(served, candidates, checks, [])


def _prove_fused(
    eager: Served,
    verdict: Verdict,
    prover: DecoderProver,
    fuse: Callable[[Served], Served],
    reporter: Reporter,
) -> tuple[Served | None, list[Check], str]:
    """The fused form if it may be served, its checks, and else why not."""
    if verdict != "equal":
        return None, [], "not tried: the model itself could not be proved"
    if MEMORY_FACTOR * eager.weight_bytes > available_bytes():
        return None, [], "not tried: there is too little memory for a second form"
    with reporter.phase("prove") as report:
        try:
            with within(FUSE_SECONDS, "making and proving the fused form"):
                report(1.0, "making the fused form")
                fused = fuse(eager)
                proof = prover.prove(fused.form, lambda label, _: report(1.0, label))
        except (NotThisWay, TimeoutError) as error:
            report(1.0, f"no fused form: {error}")
            return None, [], f"not made: {error}"
        except Exception as error:  # of torch's compiler, on a graph of anyone's making
            logger.exception("the fused form failed")
            return None, [], f"not made ({type(error).__name__}); the build's log says where"
    if fused.info.max_context_tokens < eager.info.max_context_tokens:
        return None, [], f"its context ends at {fused.info.max_context_tokens:,} tokens"
    if proof.verdict != "equal":
        report(1.0, "the fused form differs from the model, and is not served")
        return None, proof.checks, "its proof failed, so it is not served"
    return fused, proof.checks, ""
