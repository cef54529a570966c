"""Sends a parcel through tus: in pieces with checksums, on through cuts and restarts of the box,
and on from where an earlier command was stopped.

What an earlier command began is remembered in `$XDG_STATE_HOME/tapeout/uploads`, one small file
for each unfinished upload.
"""

import base64
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from app.cli.client import Box, Refused, Unreachable
from app.cli.packing import FileChanged, Parcel
from app.cli.progress import ProgressBar, megabytes

CHUNK_BYTES = 16 * 1024**2
SHOWN_BYTES = 256 * 1024
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # a restart of the box is over by then
ANSWER_SECONDS = 300.0  # after its restart the box reads again what it has, before it goes on
FORGET_SECONDS = 2 * 24 * 3600
GONE = (404, 410)
PASSING = (408, 409, 423, 429, 460)  # the box says where to go on, or takes the piece next time
FULL = 507
TUS = {"Tus-Resumable": "1.0.0"}


class Sender:
    """One parcel on its way to one box."""

    def __init__(self, box: Box, parcel: Parcel) -> None:
        self._box = box
        self._parcel = parcel
        self._memory = _memory(box, parcel)
        self._ahead = ReadAhead(parcel)
        self._location = ""
        self._offset = 0

    def send(self) -> str:
        """The complete upload's id. Raises `Refused` for what waiting does not mend, and leaves
        the process with a word on how to go on when it is interrupted."""
        self._location = self._remembered()
        if self._location:
            self._ask_offset()
        if not self._location:
            self._create()
        title = f"Uploading {self._parcel.filename}"
        bar = ProgressBar(title, self._parcel.num_bytes, self._offset)
        if self._offset:
            share = self._offset / self._parcel.num_bytes
            bar.say(f"The box has {megabytes(self._offset)} of it ({share:.0%}); going on there.")
        try:
            self._send_rest(bar)
            self._parcel.check_unchanged()
        except FileChanged:
            self._discard()
            raise
        except KeyboardInterrupt:
            share = self._offset / self._parcel.num_bytes
            bar.say(
                f"Stopped at {share:.0%}. Give the same command within a day to go on from there."
            )
            raise SystemExit(130) from None
        finally:
            self._ahead.close()
        bar.finish()
        return self._location.rsplit("/", 1)[-1]

    def forget(self) -> None:
        """Once nothing needs the upload again."""
        with suppress(OSError):
            self._memory.unlink(missing_ok=True)

    def _discard(self) -> None:
        """Here and at the box. One that cannot be reached now lets it expire."""
        self.forget()
        with suppress(Refused):
            self._box.request("DELETE", self._location, headers=TUS)

    def _send_rest(self, bar: ProgressBar) -> None:
        failures = 0
        must_ask = False
        while self._offset < self._parcel.num_bytes:
            try:
                if must_ask:
                    self._ask_offset()
                    if not self._location:
                        self._create()
                    must_ask = False
                    continue
                self._send_piece(bar)
                failures = 0
            except Refused as error:
                if not _is_passing(error) or failures >= len(RETRY_SECONDS):
                    raise
                # A client that came back too soon finds the offset a little further on.
                wait = 0.0 if error.status == 409 and not failures else RETRY_SECONDS[failures]
                if wait >= 1:
                    bar.say(f"{error.message.splitlines()[0]} Trying again in {wait:.0f} s.")
                time.sleep(wait)
                failures += 1
                must_ask = True
            bar.show(self._offset)

    def _create(self) -> None:
        filename = base64.b64encode(self._parcel.filename.encode()).decode()
        headers = {
            **TUS,
            "Upload-Length": str(self._parcel.num_bytes),
            "Upload-Metadata": f"filename {filename}",
        }
        created = self._box.checked(self._box.request("POST", "/api/uploads", headers=headers))
        self._location = created.headers["Location"]
        self._offset = 0
        self._remember()

    def _ask_offset(self) -> None:
        """Where to go on; with no `_location` afterwards, the upload is gone."""
        head = self._box.request("HEAD", self._location, headers=TUS)
        if head.status_code in GONE:
            self._location, self._offset = "", 0
            self.forget()
            return
        headers = self._box.checked(head).headers
        if headers["Upload-Length"] != str(self._parcel.num_bytes):
            self._location, self._offset = "", 0  # another file's, after all
            return
        self._offset = int(headers["Upload-Offset"])

    def _send_piece(self, bar: ProgressBar) -> None:
        piece, checksum = self._ahead.take(self._offset)
        headers = {
            **TUS,
            "Upload-Offset": str(self._offset),
            "Upload-Checksum": f"sha256 {checksum}",
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(len(piece)),
        }
        response = self._box.request(
            "PATCH",
            self._location,
            headers=headers,
            content=self._shown(piece, bar),
            timeout=ANSWER_SECONDS,
        )
        self._offset = int(self._box.checked(response).headers["Upload-Offset"])

    def _shown(self, piece: bytes, bar: ProgressBar) -> Iterator[bytes]:
        """The piece, with the bar moving as it leaves: on a slow line it takes long."""
        for start in range(0, len(piece), SHOWN_BYTES):
            yield piece[start : start + SHOWN_BYTES]
            bar.show(self._offset + min(start + SHOWN_BYTES, len(piece)))

    # --- between two commands ---------------------------------------------------------------

    def _remembered(self) -> str:
        """Where an earlier command began to upload the same files; empty for none."""
        with suppress(OSError, UnicodeDecodeError):
            for path in self._memory.parent.iterdir():
                if time.time() - path.stat().st_mtime > FORGET_SECONDS:
                    path.unlink(missing_ok=True)
            location = self._memory.read_text().strip()
            if location.startswith("/api/uploads/"):
                return location
        return ""

    def _remember(self) -> None:
        # Where nothing can be kept, an interrupted upload begins anew: no reason to refuse it.
        with suppress(OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._memory.write_text(f"{self._location}\n")


class ReadAhead:
    """Reads and hashes the next piece while one is on its way."""

    def __init__(self, parcel: Parcel) -> None:
        self._parcel = parcel
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[tuple[bytes, str]]] | None = None

    def take(self, offset: int) -> tuple[bytes, str]:
        """The piece at `offset` and its SHA-256 in base64. Raises `Refused` where a file changed
        meanwhile."""
        if self._next is None or self._next[0] != offset:
            piece, checksum = self._read(offset)
        else:
            piece, checksum = self._next[1].result()
        after = offset + len(piece)
        self._next = None
        if after < self._parcel.num_bytes:
            self._next = (after, self._thread.submit(self._read, after))
        return piece, checksum

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _read(self, offset: int) -> tuple[bytes, str]:
        piece = self._parcel.read(offset, CHUNK_BYTES)
        return piece, base64.b64encode(hashlib.sha256(piece).digest()).decode()


def _is_passing(error: Refused) -> bool:
    if isinstance(error, Unreachable):
        return True
    return error.status in PASSING + GONE or (error.status >= 500 and error.status != FULL)


def _memory(box: Box, parcel: Parcel) -> Path:
    """Named by the box and by the files as they are now: one that changed is another upload."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    digest = hashlib.sha256(f"{box.url}\n{parcel.fingerprint()}".encode()).hexdigest()
    return Path(state) / "tapeout" / "uploads" / digest[:32]
