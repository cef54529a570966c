"""Predictions that ran, and have no answer by what their callers asked for.

Owns which failures are of that kind; what is charged for them is the relay's.
"""

from app.core.errors import AppError, RuntimeFailure
from app.deployments.claims import failure_of
from runtime.protocol import Failed

# The answer is too large; the model fails on the input.
CALLERS_STATUSES = {413, 422}


class FailedRun(RuntimeFailure):
    """A prediction that ran for `device_ns` and failed by what its caller asked for."""

    device_ns = 0


def failure_of_run(failed: Failed) -> RuntimeFailure:
    """As `failure_of`; a `FailedRun` where the failure is none of the box's. The time it claims is
    to be checked before."""
    failure = failure_of(failed.error)
    if failure.status not in CALLERS_STATUSES or not failed.device_ns:
        return failure
    run = FailedRun(
        failure.message,
        status=failure.status,
        type=failure.type,
        code=failure.code,
        param=failure.param,
    )
    run.device_ns = failed.device_ns
    return run


def device_ns_of(error: AppError) -> int:
    """What was run for nothing, by its caller's doing."""
    return error.device_ns if isinstance(error, FailedRun) else 0
