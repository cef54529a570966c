"""The journal: what is durable when, recovery after every kind of end, and segments."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from app.core.errors import Conflict, Unavailable
from app.core.failpoints import observed
from app.metering.journal import LAZY_SECONDS, Journal, read_unsettled
from app.metering.records import AdmitRecord, FinishRecord, Usage
from app.metering.segments import Segment, SegmentReader, segment_numbers, segment_path
from runtime.protocol import FinishReason, SequenceOutput


def admitted(request_id: str, num_prompt_tokens: int = 10, num_choices: int = 1) -> AdmitRecord:
    return AdmitRecord(
        request_id=request_id,
        organization_id="org_1",
        api_key_id="key_1",
        api_key_name="test",
        endpoint_name="tiny",
        version_number=1,
        route="/v1/completions",
        kind="decoder",
        service_class="standard",
        price_book_id="pb_1",
        started_at_ns=1_000,
        num_prompt_tokens=num_prompt_tokens,
        num_choices=num_choices,
    )


def output(
    request_id: str,
    num_tokens: int = 1,
    finish_reason: FinishReason | None = None,
    *,
    choice: int = 0,
    cached: int = 4,
) -> SequenceOutput:
    return SequenceOutput(
        request_id=request_id,
        choice=choice,
        token_ids=list(range(num_tokens)),
        text="x" * num_tokens,
        num_cached_tokens=cached,
        device_ns=400_000,
        finish_reason=finish_reason,
    )


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(tmp_path, segment_bytes=600)
    await journal.start()
    yield journal
    await journal.close()


async def recovered(directory: Path) -> dict[str, Usage]:
    """What a next process would find."""
    journal = Journal(directory)
    usages = await journal.start()
    await journal.close()
    return {usage.admitted.request_id: usage for usage in usages}


async def test_finished_and_unfinished_requests_are_told_apart(
    journal: Journal, tmp_path: Path
) -> None:
    for name in ("done", "cut", "ended", "never-ran"):
        journal.admit(admitted(name))
    await journal.commit_step([output("done", 3), output("cut", 2), output("ended")])
    await journal.commit_step([output("done", 1, "stop"), output("cut")])
    await journal.finish(FinishRecord("ended", 9_000, "cancelled", "abort", device_ns=600_001))
    await journal.close()

    usages = await recovered(tmp_path)

    assert {name: usage.outcome for name, usage in usages.items()} == {
        "done": "completed",
        "cut": "lost",
        "ended": "cancelled",
        "never-ran": "lost",
    }
    done = usages["done"]
    assert (done.input_tokens, done.cached_tokens, done.output_tokens) == (6, 4, 4)
    assert done.device_ms == 1
    assert usages["cut"].output_tokens == 3
    assert usages["ended"].device_ms == 2  # 1,000,001 ns is more than one millisecond
    assert usages["never-ran"].output_tokens == 0


async def test_every_choice_must_finish(journal: Journal, tmp_path: Path) -> None:
    journal.admit(admitted("two", num_choices=2))
    await journal.commit_step([output("two", 1, "stop"), output("two", 2, choice=1)])
    assert read_unsettled(tmp_path).usages[0].outcome == "lost"
    await journal.commit_step([output("two", 1, "length", choice=1)])
    assert read_unsettled(tmp_path).usages[0].outcome == "completed"


async def test_a_committed_record_is_on_disk_when_commit_returns(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync = Segment.sync
    monkeypatch.setattr(Segment, "sync", lambda self: (synced.append(self.size_bytes), sync(self)))
    journal.admit(admitted("a"))
    await journal.commit_step([output("a", 5)])
    assert synced, "returned before the disk had it"
    assert read_unsettled(tmp_path).usages[0].output_tokens == 5


async def test_steps_that_wait_together_share_one_sync(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_syncs = 0
    sync = Segment.sync

    def counted(self: Segment) -> None:
        nonlocal num_syncs
        num_syncs += 1
        sync(self)

    monkeypatch.setattr(Segment, "sync", counted)
    for i in range(100):
        journal.admit(admitted(f"r{i}"))
    await asyncio.gather(*(journal.commit_step([output(f"r{i}")]) for i in range(100)))
    assert num_syncs < 60  # rotation of the small segments syncs too


async def test_settled_requests_are_forgotten_and_their_segments_deleted(
    journal: Journal, tmp_path: Path
) -> None:
    for i in range(50):
        journal.admit(admitted(f"r{i}"))
        await journal.commit_step([output(f"r{i}", 1, "stop")])
        if i != 20:
            journal.settled([f"r{i}"])
    await journal.commit_step([output("r20")])
    assert min(segment_numbers(tmp_path)) > 1, "segments of settled requests remain"
    assert [u.admitted.request_id for u in read_unsettled(tmp_path).usages] == ["r20"]
    journal.settled(["r20"])
    await journal.close()
    assert len(segment_numbers(tmp_path)) <= 2
    assert await recovered(tmp_path) == {}


async def test_a_torn_tail_loses_only_itself(journal: Journal, tmp_path: Path) -> None:
    journal.admit(admitted("a"))
    await journal.commit_step([output("a", 2)])
    await journal.close()
    (number,) = segment_numbers(tmp_path)
    path = segment_path(tmp_path, number)
    whole = path.read_bytes()
    before = len(list(SegmentReader(path)))
    for cut in range(12, len(whole)):
        path.write_bytes(whole[:cut])
        reader = SegmentReader(path)
        assert len(list(reader)) <= before
        assert reader.num_unread_bytes <= cut
    path.write_bytes(whole + b"\x07torn")
    usages = await recovered(tmp_path)
    assert usages["a"].output_tokens == 2


async def test_a_damaged_record_ends_its_segment_but_not_the_next(tmp_path: Path) -> None:
    for name in ("a", "b"):
        journal = Journal(tmp_path)
        await journal.start()
        journal.admit(admitted(name))
        await journal.commit_step([output(name, 2, "stop")])
        await journal.close()
    first = segment_path(tmp_path, segment_numbers(tmp_path)[0])
    data = bytearray(first.read_bytes())
    data[-1] ^= 0xFF
    first.write_bytes(bytes(data))
    usages = await recovered(tmp_path)
    assert usages["a"].outcome == "lost"
    assert usages["b"].outcome == "completed"


async def test_a_disk_error_fails_the_step_and_a_later_one_succeeds(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Segment.append

    def full(self: Segment, payloads: list[bytes]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Segment, "append", full)
    journal.admit(admitted("a"))
    with pytest.raises(Unavailable) as caught:
        await journal.commit_step([output("a")])
    assert caught.value.code == "journal_unavailable"
    monkeypatch.setattr(Segment, "append", append)
    await journal.commit_step([output("a", 2, "stop")])
    (usage,) = read_unsettled(tmp_path).usages
    assert usage.output_tokens == 2  # the step that failed was never delivered


@pytest.mark.parametrize("broken", ["append", "sync"])
async def test_an_unforeseen_error_fails_every_step_from_then_on(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    journal.admit(admitted("a"))
    await journal.commit_step([output("a", 2)])
    with monkeypatch.context() as patch:
        patch.setattr(Segment, broken, lambda *_: 1 // 0)
        answers = await asyncio.gather(
            *(journal.commit_step([output("a")]) for _ in range(5)), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [Unavailable] * 5
    assert not journal.is_alive
    journal.admit(admitted("b"))
    journal.settled(["a"])
    for _ in range(2):  # although the disk would take it now
        with pytest.raises(Unavailable):
            await journal.commit_step([output("a")])
    await journal.close()
    usages = await recovered(tmp_path)
    assert list(usages) == ["a"]
    assert usages["a"].output_tokens >= 2


async def test_a_segment_that_cannot_be_closed_does_not_end_the_journal(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Segment.close

    def failing(self: Segment) -> None:
        close(self)
        raise OSError(5, "Input/output error")

    await journal.commit_step([output("a")])
    with monkeypatch.context() as patch:
        patch.setattr(Segment, "close", failing)
        patch.setattr(Segment, "append", lambda *_: failing_write())
        with pytest.raises(Unavailable):
            await journal.commit_step([output("a")])
    await journal.commit_step([output("a")])
    assert journal.is_alive


def failing_write() -> None:
    raise OSError(5, "Input/output error")


async def test_nothing_waits_for_a_closed_journal(journal: Journal) -> None:
    assert journal.is_alive
    await journal.close()
    assert not journal.is_alive
    with pytest.raises(Unavailable):
        await journal.commit_step([output("a")])


async def test_two_processes_cannot_share_a_journal(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="Another process"):
        await Journal(tmp_path).start()


async def test_the_identity_survives_a_restart(journal: Journal, tmp_path: Path) -> None:
    await journal.close()
    again = Journal(tmp_path)
    await again.start()
    assert again.id == journal.id != ""
    await again.close()


async def test_the_identity_is_durable_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    seen: dict[str, bool] = {}
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def look(name: str) -> None:
        if name == "journal.before_identity":
            seen[name] = (tmp_path / "id.new").stat().st_ino in synced
        elif name == "journal.after_identity":
            seen[name] = tmp_path.stat().st_ino in synced

    monkeypatch.setattr(os, "fsync", noted)
    journal = Journal(tmp_path)
    with observed(look):
        await journal.start()
    await journal.close()
    assert seen == {"journal.before_identity": True, "journal.after_identity": True}


async def test_records_of_another_version_stop_the_start(tmp_path: Path) -> None:
    segment = Segment(tmp_path, 1)
    payload = b"\x92\xa6future\x01"
    segment.append([len(payload).to_bytes(4, "little"), zlib.crc32(payload).to_bytes(4, "little")])
    segment.append([payload])
    segment.close()
    journal = Journal(tmp_path)
    with pytest.raises(Conflict, match="another version"):
        await journal.start()
    await journal.close()


KILLED = """
import asyncio, sys
from pathlib import Path
from app.metering.journal import Journal
from tests.app.metering.test_journal import admitted, output

async def main():
    journal = Journal(Path(sys.argv[1]), segment_bytes=4000)
    await journal.start()
    i = 0
    while True:
        journal.admit(admitted(f"r{i}"))
        await journal.commit_step([output(f"r{i}", 2)])
        print(f"r{i} delivered", flush=True)
        await journal.commit_step([output(f"r{i}", 1, "stop")])
        print(f"r{i} done", flush=True)
        i += 1

asyncio.run(main())
"""


def test_nothing_delivered_is_missing_after_kill_9(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    directory.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(directory)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().decode().split() for _ in range(301)]
    os.kill(process.pid, signal.SIGKILL)
    rest = [line.split() for line in process.stdout.read().decode().splitlines()]
    process.wait()
    process.stdout.close()
    usages = {u.admitted.request_id: u for u in read_unsettled(directory).usages}
    for name, state in [line for line in lines + rest if len(line) == 2]:
        if state == "done":
            assert usages[name].outcome == "completed"
            assert usages[name].output_tokens == 3
        else:
            assert usages[name].output_tokens >= 2


async def test_a_step_of_any_size_can_be_read_again(journal: Journal, tmp_path: Path) -> None:
    """A worker decides how many outputs it sends; no record of other requests may suffer."""
    journal.admit(admitted("a"))
    journal.admit(admitted("b"))
    await journal.commit_step([output("a", 0)] * 330_000 + [output("a", 1, "stop")])
    await journal.commit_step([output("b", 1, "stop")])
    await journal.close()

    usages = await recovered(tmp_path)

    assert {name: usage.outcome for name, usage in usages.items()} == {
        "a": "completed",
        "b": "completed",
    }


async def test_marks_of_what_is_settled_reach_the_disk_of_an_idle_box(
    journal: Journal,
) -> None:
    journal.admit(admitted("req_1"))
    await journal.commit_step([output("req_1", finish_reason="stop")])
    await asyncio.to_thread(journal.settled, ["req_1"])
    await asyncio.sleep(10 * LAZY_SECONDS)
    assert read_unsettled(journal.directory).usages == []


async def test_sync_makes_marks_durable_at_once(journal: Journal) -> None:
    journal.admit(admitted("req_1"))
    await journal.commit_step([output("req_1", finish_reason="stop")])
    journal.settled(["req_1"])
    await journal.sync()
    assert read_unsettled(journal.directory).usages == []


@pytest.mark.parametrize(
    ("is_stream", "reason", "outcome"),
    [
        (True, "abort", "cancelled"),
        (True, "refused", "cancelled"),
        (False, "abort", "lost"),
        (False, "refused", "lost"),
        # Written ahead: the answer may have left, so it counts as delivered.
        (False, "stop", "completed"),
    ],
)
async def test_a_crash_does_not_charge_for_an_end_without_an_answer(
    journal: Journal, is_stream: bool, reason: FinishReason, outcome: str
) -> None:
    journal.admit(msgspec.structs.replace(admitted("req_1"), is_stream=is_stream))
    await journal.commit_step([output("req_1", num_tokens=3, finish_reason=reason)])
    [usage] = read_unsettled(journal.directory).usages
    assert usage.outcome == outcome
