"""How a request ends that its caller gets no answer to, beside what its worker says.

Owns the words and the status. Does not own who pays (relay.py).
"""

from app.core.errors import RuntimeFailure


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


def aborted() -> RuntimeFailure:
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


def grammar_refused() -> RuntimeFailure:
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
