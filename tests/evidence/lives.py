"""One life of a box: recovery, traffic, and an end that may come at a failpoint."""

import asyncio
import logging
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import msgspec

from app.api import endings
from app.core.failpoints import Countdown, observed
from tests.evidence import traffic
from tests.evidence.box import Box


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """`failpoint` is as in the environment's FAILPOINT, where it ends; `kill_after_seconds` ends it
    wherever it is. With neither it ends in peace. With `seconds` 0 it only recovers."""

    data_dir: str
    url: str
    seed: int
    seconds: float
    failpoint: str = ""
    kill_after_seconds: float = 0.0


def live(life: Life) -> None:
    logging.basicConfig(level=logging.ERROR)
    # The traffic has answers that cannot be made.
    logging.getLogger(endings.__name__).setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        if life.failpoint:
            stack.enter_context(observed(Countdown(life.failpoint, _kill)))
        asyncio.run(_live(life))


async def _live(life: Life) -> None:
    box = Box(Path(life.data_dir), life.url)
    await box.start()
    await traffic.prepare(box)
    if life.seconds:
        await box.connect()
        log = traffic.Log(Path(life.data_dir) / "seen.log")
        await traffic.run(box, log, life.seed, life.seconds)
    await box.close()


def _kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
