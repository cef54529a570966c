"""What a caller is told of a worker's error."""

import math

import pytest

from app.deployments.claims import failure_of
from runtime.protocol import WireError


@pytest.mark.parametrize(
    ("claimed", "seconds"),
    [
        (None, 1),
        (0.2, 1),
        (1.5, 2),
        (12.0, 12),
        (1e9, 60),
        (math.inf, 60),
        (-math.inf, 1),
        (math.nan, 1),
    ],
)
def test_when_to_try_again_is_the_workers_estimate_within_bounds(
    claimed: float | None, seconds: int
) -> None:
    error = WireError(
        type="rate_limit_error",
        code="queue_full",
        message="Full.",
        status=429,
        retry_after_seconds=claimed,
    )
    assert failure_of(error).retry_after_seconds == seconds


def test_what_no_waiting_helps_names_no_time() -> None:
    error = WireError(
        type="server_error", code="broken", message="Broken.", status=500, retry_after_seconds=5
    )
    assert failure_of(error).retry_after_seconds is None
