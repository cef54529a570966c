"""A real process of money, killed at every failpoint and at random, then started again.

After each recovery: nothing that was delivered is missing from the books, nothing is on them
twice, no money is held, and all the invariants hold.
"""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from app.metering.journal import read_unsettled
from app.metering.records import SettledRecord
from app.metering.segments import SegmentReader, segment_numbers, segment_path
from tests.evidence.conftest import MortalBox
from tests.evidence.failpoint_names import failpoint_names
from tests.evidence.seen import Totals

KILLED = -signal.SIGKILL
SECONDS = 20.0  # a failpoint that traffic does not reach within it is reached by nobody
NUM_KILLS = int(os.environ.get("SOAK_KILLS", "300"))
MODULES = ("accounts", "database", "journal", "posting", "relay", "segments")
CORE = [name for name in failpoint_names() if name.partition(".")[0] in MODULES]
# Reached but once in a life.
ONCE = {"journal.before_identity", "journal.after_identity", "journal.after_recovery"} | {
    "relay.after_recovered_settled"
}
# Reached in a recovery alone, after a kill at the other place.
AFTER = {"accounts.before_lone_settle_commit": "accounts.after_settle_commit:2"}


@pytest.mark.parametrize("name", CORE)
def test_a_kill_at_any_failpoint_loses_and_doubles_nothing(
    mortal_box: MortalBox, name: str
) -> None:
    """Killed there, killed again somewhere in the recovery, then left alone."""
    seed = sum(name.encode())
    if name in AFTER:
        assert mortal_box.live(seed=seed, seconds=SECONDS, failpoint=AFTER[name]) == KILLED
    num_times = 1 if name in ONCE | AFTER.keys() else seed % 3 + 1
    assert mortal_box.live(seed=seed, seconds=SECONDS, failpoint=f"{name}:{num_times}") == KILLED
    mortal_box.live(seed=seed + 1, failpoint=f"*:{seed % 12 + 1}")
    assert mortal_box.live() == 0
    mortal_box.examine()


@pytest.mark.parametrize(
    "num_kills",
    [
        pytest.param(4, id="short"),
        pytest.param(
            NUM_KILLS, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(NUM_KILLS * 10 + 60)]
        ),
    ],
)
def test_kills_at_random_moments_lose_and_double_nothing(
    mortal_box: MortalBox, num_kills: int
) -> None:
    """One box and its books live through all of them."""
    rng = random.Random(num_kills)  # noqa: S311
    totals, num_dead = Totals(), 0
    for kill in range(num_kills):
        if kill % 2:
            end = {"kill_after_seconds": 0.1 + rng.expovariate(4)}
        else:
            end = {"failpoint": f"*:{int(10 ** rng.uniform(1, 3.5))}"}
        num_dead += mortal_box.live(seed=kill, seconds=SECONDS, **end) == KILLED
        if kill % 10 == 0 or kill == num_kills - 1:
            assert mortal_box.live() == 0
            totals = mortal_box.examine()
    totals.kills = num_dead
    print(f"\n{totals}")  # noqa: T201 - the figures to record
    assert num_dead > num_kills * 9 // 10, "too few were reached in time"
    assert totals.delivered_tokens > num_kills


def test_a_tail_torn_at_any_byte_loses_only_what_was_not_synced(
    mortal_box: MortalBox, tmp_path: Path
) -> None:
    """The last records of a killed journal, cut at every byte: what is left recovers, and never
    to more than the whole would have."""
    assert (
        mortal_box.live(seed=1, seconds=SECONDS, failpoint="relay.before_last_output:9") == KILLED
    )
    journal = mortal_box.directory / "journal"
    last = segment_path(journal, segment_numbers(journal)[-1])
    whole = _unsettled(journal)
    settled = {  # marked as such at some length
        request_id
        for record in SegmentReader(last)
        if isinstance(record, SettledRecord)
        for request_id in record.request_ids
    }
    data = last.read_bytes()
    copy = tmp_path / "torn"
    shutil.copytree(journal, copy)
    before: dict[str, int] = {}
    for length in range(len(data) + 1):
        (copy / last.name).write_bytes(data[:length])
        found = _unsettled(copy)
        for request_id, num_tokens in before.items():
            is_told = found.get(request_id, 0) >= num_tokens
            assert is_told or request_id in settled, "a longer tail tells less"
        for request_id, num_tokens in found.items():
            assert request_id in settled or whole[request_id] >= num_tokens
        before = found
    assert before == whole
    last.write_bytes(data + b"\x40\x00\x00\x00torn")
    assert mortal_box.live() == 0
    mortal_box.examine()


def _unsettled(journal: Path) -> dict[str, int]:
    return {
        usage.admitted.request_id: usage.output_tokens for usage in read_unsettled(journal).usages
    }
