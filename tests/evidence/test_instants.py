"""That a request's instants are stored to the microsecond, cut and never rounded."""

from datetime import UTC, datetime

import pytest

from app.billing.posting import _instant


@pytest.mark.parametrize(
    ("at_ns", "instant"),
    [
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (1_999_999_999, datetime(1970, 1, 1, 0, 0, 1, 999_999, tzinfo=UTC)),
        (1_795_000_000_123_456_789, datetime(2026, 11, 18, 11, 6, 40, 123_456, tzinfo=UTC)),
    ],
)
def test_nanoseconds_become_microseconds(at_ns: int, instant: datetime) -> None:
    assert _instant(at_ns) == instant
