from pathlib import Path

import pytest

from app.deployments.logs import LogFile, clean_text, delete_log, last_line, read_log


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "a.log"


def test_is_read_on_from_where_reading_stopped(path: Path) -> None:
    log = LogFile(path)
    log.write(b"one\n")
    first = read_log(path)
    assert first.text == "one\n"
    log.write(b"two\n")
    second = read_log(path, first.next_offset)
    assert (second.text, second.next_offset) == ("two\n", 8)
    assert read_log(path, second.next_offset).text == ""
    assert read_log(path, -4).text == "two\n"
    log.close()
    log.write(b"late")  # its process is gone; nothing to complain about
    assert read_log(path).text == "one\ntwo\n"


def test_no_log_reads_as_empty(path: Path) -> None:
    assert read_log(path, 5).text == ""
    assert last_line(path) == ""


def test_a_flood_is_left_out_and_said_so(path: Path) -> None:
    clock = Clock()
    log = LogFile(path, rate_bytes_per_second=1024, burst_bytes=100, clock=clock)
    log.write(b"a" * 150)
    log.write(b"b" * 50)
    clock.seconds = 10
    log.write(b"after\n")
    log.note("ours")
    assert read_log(path).text == (
        "a" * 100 + "\n[100 bytes left out: more than 1 KiB a second]\nafter\nours\n"
    )
    log.close()


def test_old_segments_go_but_offsets_stay_valid(path: Path) -> None:
    log = LogFile(path, burst_bytes=10**9, segment_bytes=100)
    for number in range(100):
        log.write(b"%09d\n" % number)  # ten bytes each
    log.close()
    assert sum(p.stat().st_size for p in path.parent.iterdir()) <= 500
    assert read_log(path, 990).text == "000000099\n"
    from_start = read_log(path, 0)
    assert from_start.text.startswith("[600 earlier bytes were dropped")
    assert from_start.next_offset == 1000
    text, offset = "", 600
    while chunk := read_log(path, offset, max_bytes=37):
        if not chunk.text:
            break
        text, offset = text + chunk.text, chunk.next_offset
    assert text == "".join(f"{number:09d}\n" for number in range(60, 100))
    # A log is continued by the next process of the same name.
    log = LogFile(path, segment_bytes=100)
    log.write(b"more\n")
    assert read_log(path, 1000).text == "more\n"
    log.close()
    delete_log(path)
    assert not list(path.parent.iterdir())


def test_characters_are_not_split(path: Path) -> None:
    log = LogFile(path)
    log.write("aé€😀z".encode())
    text, offset = "", 0
    for _ in range(20):
        piece = read_log(path, offset, max_bytes=4)
        text, offset = text + piece.text, piece.next_offset
    assert text == "aé€😀z"
    log.write(b"\xff\xe2\x82")
    assert read_log(path, 11).text == "�"
    assert read_log(path, 12).next_offset == 14  # what can never be completed does not block
    log.close()


def test_what_a_worker_prints_cannot_touch_a_terminal(path: Path) -> None:
    log = LogFile(path)
    log.write(b"\x1b[31mred\x1b[0m\x1b]0;title\x07 a\rb\r\n\x00\x9b")
    assert read_log(path).text == "red a\nb\n��"
    log.note("one\ntwo\x1b[2J")
    assert read_log(path).text.endswith("\none two\n")
    log.close()
    assert clean_text("x" * 10, 4) == "xxx…"
    assert clean_text("\ud800") == "?"


def test_the_last_line_is_the_processs_own(path: Path) -> None:
    log = LogFile(path)
    log.write(b"Traceback\nValueError: no\n\n")
    log.note("[ended]")
    log.close()
    assert last_line(path) == "ValueError: no"
