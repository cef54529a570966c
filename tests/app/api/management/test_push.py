"""`tapeout push`'s way of sending, against the box itself: cuts, restarts, Ctrl-C, damage."""

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar import Litestar

from app.cli import sending
from app.cli.client import Box, Refused, Unreachable
from app.cli.packing import pack
from app.cli.sending import Sender
from app.registry.uploads import UploadStore
from tests.app.api.management.callers import Caller

DATA = os.urandom(1_000_003)
PIECE_BYTES = 100_000
PIECES = [*range(0, len(DATA), PIECE_BYTES)]

Trouble = Callable[[int, dict[str, Any]], None]


class ScriptedBox(Box):
    """Counts the pieces it sends. `trouble` gets each one's number and may change or prevent it."""

    def __init__(self, trouble: Trouble = lambda *_: None) -> None:
        super().__init__()
        self.offsets: list[int] = []
        self.calls: list[str] = []
        self._trouble = trouble

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        self.calls.append(method)
        if method == "PATCH":
            self.offsets.append(int(arguments["headers"]["Upload-Offset"]))
            self._trouble(len(self.offsets), arguments)
        return super().request(method, path, **arguments)

    def close(self) -> None:
        self._http.close()


@pytest.fixture
def path(tmp_path: Path, server: str, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model file, and the command's surroundings."""
    monkeypatch.setenv("TAPEOUT_URL", f"http://{server}")
    monkeypatch.setenv("TAPEOUT_API_KEY", caller.secret)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sending, "CHUNK_BYTES", PIECE_BYTES)
    monkeypatch.setattr(sending, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    path = tmp_path / "model.pt2"
    path.write_bytes(DATA)
    return path


async def send(box: ScriptedBox, path: Path) -> str:
    try:
        return await asyncio.to_thread(lambda: Sender(box, pack(path, None)).send())
    finally:
        box.close()


async def check(app: Litestar, caller: Caller, upload_id: str, data: bytes = DATA) -> None:
    store: UploadStore = app.state.uploads
    upload = await store.get(upload_id, caller.organization_id)
    assert (upload.status, upload.filename) == ("complete", "model.pt2")
    assert upload.sha256 == hashlib.sha256(data).hexdigest()


async def test_every_piece_once(
    app: Litestar, caller: Caller, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box = ScriptedBox()
    await check(app, caller, await send(box, path))
    assert box.offsets == PIECES
    assert box.calls == ["POST"] + ["PATCH"] * len(PIECES)
    assert "Uploading model.pt2: 1.0 MB" in capsys.readouterr().err


async def test_ctrl_c_and_the_same_command_again(
    app: Litestar, caller: Caller, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(number: int, _: object) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        await send(ScriptedBox(interrupt), path)
    assert ended.value.code == 130
    assert "Stopped at 40%" in capsys.readouterr().err

    box = ScriptedBox()
    upload_id = await send(box, path)
    assert box.offsets == PIECES[4:]
    assert "(40%); going on there" in capsys.readouterr().err
    await check(app, caller, upload_id)
    # Until a version was made of it, not even that is sent again.
    again = ScriptedBox()
    assert await send(again, path) == upload_id
    assert again.calls == ["HEAD"]
    Sender(again, pack(path, None)).forget()
    assert await send(ScriptedBox(), path) != upload_id


async def test_a_file_that_changed_is_another_upload(
    app: Litestar, caller: Caller, path: Path
) -> None:
    def interrupt(number: int, _: object) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        await send(ScriptedBox(interrupt), path)
    other = os.urandom(len(DATA))
    await asyncio.to_thread(path.write_bytes, other)
    box = ScriptedBox()
    await check(app, caller, await send(box, path), other)
    assert box.offsets == PIECES


@pytest.mark.parametrize("number", [3, len(PIECES)])
async def test_a_file_rewritten_meanwhile_is_refused_and_nothing_of_it_is_kept(
    app: Litestar, caller: Caller, path: Path, number: int
) -> None:
    other = os.urandom(len(DATA))

    def rewrite(now: int, _: object) -> None:
        if now == number:
            path.write_bytes(other)

    box = ScriptedBox(rewrite)
    with pytest.raises(Refused, match="changed while it was being uploaded"):
        await send(box, path)
    assert box.calls[-1] == "DELETE"
    assert list(app.state.storage.upload("any").parent.iterdir()) == []
    again = ScriptedBox()
    await check(app, caller, await send(again, path), other)
    assert again.offsets == PIECES


async def test_an_upload_that_is_gone_begins_anew(
    app: Litestar, caller: Caller, path: Path
) -> None:
    def interrupt(number: int, _: object) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        await send(ScriptedBox(interrupt), path)
    store: UploadStore = app.state.uploads
    (left,) = await store.list_open(caller.organization_id)
    await store.delete(left.id, caller.organization_id)
    box = ScriptedBox()
    await check(app, caller, await send(box, path))
    assert box.offsets == PIECES


async def test_cuts_damage_and_a_restart_of_the_box(
    app: Litestar, caller: Caller, path: Path
) -> None:
    def trouble(number: int, arguments: dict[str, Any]) -> None:
        if number == 2:
            raise Unreachable("cut")
        if number == 4:  # bits that flipped on the way
            arguments["content"] = bytes(PIECE_BYTES)
        if number == 6:  # half of a piece
            arguments["content"] = bytes(PIECE_BYTES // 2)
            arguments["headers"]["Content-Length"] = str(PIECE_BYTES // 2)
        if number == 8:  # a new process, which knows only what is on the disk
            state = app.state
            state.uploads = UploadStore(state.database, state.storage, state.settings)
        if number == 10:  # another piece has arrived than was thought
            arguments["headers"]["Upload-Offset"] = "7"

    box = ScriptedBox(trouble)
    await check(app, caller, await send(box, path))
    assert sorted(set(box.offsets)) == PIECES
    assert len(box.offsets) == len(PIECES) + 4  # only what went wrong was sent twice


async def test_what_does_not_pass_is_not_tried_again(
    app: Litestar, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.state.storage, "free_bytes", lambda: 1000)
    box = ScriptedBox()
    with pytest.raises(Refused, match="to spare") as full:
        await send(box, path)
    assert (full.value.status, box.calls) == (507, ["POST"])


async def test_it_gives_up_when_nobody_answers(path: Path) -> None:
    def trouble(number: int, _: object) -> None:
        if number > 2:
            raise Unreachable("no answer from the box")

    box = ScriptedBox(trouble)
    with pytest.raises(Refused, match="no answer"):
        await send(box, path)
    assert len(box.offsets) == 2 + 1 + len(sending.RETRY_SECONDS)


async def test_where_nothing_can_be_remembered(
    app: Litestar, caller: Caller, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(path))  # a file
    await check(app, caller, await send(ScriptedBox(), path))
