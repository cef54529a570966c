"""How far a transfer is, on stderr: redrawn in place on a terminal, else a line now and then."""

import sys
import time
from collections import deque

import click

WINDOW_SECONDS = 5.0  # speed is that of the last few seconds, as it is now and not on average
REDRAW_SECONDS, LINE_SECONDS = 0.1, 5.0
NUM_CELLS = 24


class ProgressBar:
    """Bytes moved, speed and time left. What was there before counts for the bar, not the speed."""

    def __init__(self, title: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._title = title
        self._total_bytes = total_bytes
        self._began_at = self._shown_at = time.monotonic()
        self._begin_bytes = done_bytes
        self._seen = deque([(self._began_at, done_bytes)])
        self._is_terminal = sys.stderr.isatty()

    def show(self, done_bytes: int) -> None:
        moment = time.monotonic()
        self._seen.append((moment, done_bytes))
        while len(self._seen) > 2 and moment - self._seen[0][0] > WINDOW_SECONDS:
            self._seen.popleft()
        if moment - self._shown_at < (REDRAW_SECONDS if self._is_terminal else LINE_SECONDS):
            return
        self._shown_at = moment
        self._draw(done_bytes)

    def say(self, line: str) -> None:
        """A remark in between."""
        click.echo(f"\r\033[K{line}" if self._is_terminal else line, err=True)

    def finish(self) -> None:
        seconds = max(time.monotonic() - self._began_at, 1e-6)
        sent_bytes = self._total_bytes - self._begin_bytes
        if not sent_bytes:
            return
        self.say(f"{self._title}: {megabytes(sent_bytes)} at {sent_bytes / 1e6 / seconds:.0f} MB/s")

    def _draw(self, done_bytes: int) -> None:
        (since, first_bytes), (until, last_bytes) = self._seen[0], self._seen[-1]
        speed = max(last_bytes - first_bytes, 0) / max(until - since, 1e-6)
        share = done_bytes / max(self._total_bytes, 1)
        line = f"{self._title} {share:4.0%} at {speed / 1e6:.1f} MB/s"
        if speed > 0:
            line += f", {duration((self._total_bytes - done_bytes) / speed)} left"
        if self._is_terminal:
            bar = "█" * int(share * NUM_CELLS)
            click.echo(f"\r\033[K{bar:░<{NUM_CELLS}} {line}", nl=False, err=True)
        else:
            click.echo(line, err=True)


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """To be read at a glance."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
