"""The memory that bodies take while they arrive: of one organization's together, so much. Small
ones are none of it: however many large ones come slowly, their organization is answered, and can
revoke the key that sends them.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from app.core.errors import RateLimited

UNCOUNTED_BYTES = 64 * 1024  # of each body
NUM_LARGEST = 8  # bodies of the largest size, or more smaller ones

Came = Callable[[int], object]  # is told of bytes as they come; raises `AppError` to end the body


class ArrivingBodies:
    """Every body that is not all there yet, by organization: whoever sends slowly, or not on at
    all, holds what they have sent."""

    def __init__(self, max_request_bytes: int) -> None:
        self.max_bytes = NUM_LARGEST * max_request_bytes
        self._held_bytes: dict[str, int] = {}

    def held_bytes(self, organization_id: str) -> int:
        return self._held_bytes.get(organization_id, 0)

    @contextmanager
    def counting(self, organization_id: str) -> Generator[Came]:
        """While one body arrives, of which what this yields is to be told; that raises
        `RateLimited`."""
        num_bytes, left_bytes = 0, UNCOUNTED_BYTES

        def came(num_more: int) -> None:
            nonlocal num_bytes, left_bytes
            num_more, left_bytes = max(0, num_more - left_bytes), max(0, left_bytes - num_more)
            held_bytes = self.held_bytes(organization_id) + num_more
            if held_bytes > self.max_bytes:
                raise RateLimited(
                    f"The requests that your organization is sending have {self.max_bytes:,} bytes "
                    "already, which is as many as may be on their way at once. Send fewer large "
                    "ones at the same time.",
                    code="too_many_bytes",
                    retry_after_seconds=1,
                )
            self._held_bytes[organization_id] = held_bytes
            num_bytes += num_more

        try:
            yield came
        finally:
            others_bytes = self.held_bytes(organization_id) - num_bytes
            if others_bytes:
                self._held_bytes[organization_id] = others_bytes
            else:
                self._held_bytes.pop(organization_id, None)
