"""How a request ends otherwise than by its answer: what it is settled as, and what is told of it.

Owns outcomes, reasons, words and status of what the gateway itself ends. What a worker says of a
failure of its own is `deployments/claims.py`'s, what each outcome costs `billing/policy.py`'s.
"""

import logging
from typing import NamedTuple

from app.api.errors import internal_error
from app.core.errors import AppError, RuntimeFailure
from app.core.ids import new_id
from app.metering.records import Outcome, Tally

log = logging.getLogger(__name__)


class Ending(NamedTuple):
    """`error` is what the caller gets instead of an answer, or of the rest of it."""

    outcome: Outcome
    reason: str
    error: AppError


def given_up(tally: Tally, *, is_stream: bool) -> Ending:
    """Of sequences that their worker ended, and nobody else."""
    _, reason = tally.outcome()
    if reason == "refused":
        outcome = _outcome_of_a_part(tally, is_stream=is_stream)
        return Ending(outcome, "grammar_too_complex", _grammar_refused())
    return Ending("failed", reason, _aborted())


def overdue(tally: Tally, seconds: float, *, is_stream: bool) -> Ending:
    """Of a generation that the deadline ends."""
    outcome = _outcome_of_a_part(tally, is_stream=is_stream)
    return Ending(outcome, "timeout", timed_out(seconds))


def unanswered(request_id: str, error: Exception) -> Ending:
    """Of what was computed and could not be made into an answer: too large a one is what was asked
    for, anything else is our fault, which the log has under the id that the caller gets."""
    if isinstance(error, AppError) and error.status < 500:
        return Ending("cancelled", error.code, error)
    error_id = new_id("err")
    log.error("%s: no answer could be made for %s", error_id, request_id, exc_info=error)
    return Ending("failed", "unanswered", internal_error(error_id))


def _outcome_of_a_part(tally: Tally, *, is_stream: bool) -> Outcome:
    """What a stream delivered was had; an answer that never came was not."""
    return "cancelled" if is_stream and tally.num_output_tokens else "failed"


def timed_out(seconds: float) -> RuntimeFailure:
    """The deadline of this box came first."""
    return RuntimeFailure(
        f"The request did not finish within {seconds:.0f} seconds, the limit of this box. "
        "Ask for fewer tokens, or stream them.",
        status=504,
        type="server_error",
        code="timeout",
        param=None,
    )


def client_left() -> RuntimeFailure:
    """Nobody reads it; it is for the log."""
    return RuntimeFailure(
        "The client closed the connection.",
        status=499,
        type="invalid_request_error",
        code="cancelled",
        param=None,
    )


def _aborted() -> RuntimeFailure:
    """The worker ended what nobody asked it to end."""
    failure = RuntimeFailure(
        "The model's worker gave the request up. This costs nothing; try again.",
        status=503,
        type="server_error",
        code="worker_aborted",
        param=None,
    )
    failure.retry_after_seconds = 1
    return failure


def _grammar_refused() -> RuntimeFailure:
    """The caller's own schema could not be followed to the answer's end."""
    return RuntimeFailure(
        "The answer was ended: the schema of response_format or tools became too complex to hold "
        "it to. Trying again will not help. Use fewer alternatives and optional properties, "
        "simpler patterns or shorter lengths. What was streamed until then is charged.",
        status=422,
        type="invalid_request_error",
        code="grammar_too_complex",
        param=None,
    )
