"""The stand-in's clock: the real time plus what a test moved it by, or stopped."""

import time


class Clock:
    """Seconds since the epoch, as Stripe gives all times."""

    def __init__(self) -> None:
        self._offset_seconds = 0
        self._frozen_at: int | None = None

    def now(self) -> int:
        if self._frozen_at is not None:
            return self._frozen_at
        return int(time.time()) + self._offset_seconds

    def advance(self, seconds: int) -> int:
        if self._frozen_at is not None:
            self._frozen_at += seconds
        else:
            self._offset_seconds += seconds
        return self.now()

    def freeze(self, at: int | None = None) -> int:
        """Stops at a time; from then on only `advance` and `freeze` move it."""
        self._frozen_at = self.now() if at is None else at
        return self._frozen_at
