"""What a large upload costs: MB/s beside the disk's own, and the app's memory meanwhile.

    python -m benchmarks.upload [--gigabytes 5] [--rounds 3] [--directory DIR]

Starts the whole appliance with its data on the disk of DIR and sends it a file of random bytes, in
three ways: one PATCH of everything, pieces of 16 MiB as the console's script sends them, and
`tapeout push`'s own code, whose pieces of 16 MiB carry a checksum. Each is over once the box has
made the upload durable. The disk's own speed is the same file, read and written in pieces of 1 MiB
and made durable with one `fsync`; the two alternate, and the file is in the page cache for both.
Needs three times the file's size of free disk.
"""

import argparse
import contextlib
import http.client
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from app.cli.client import Box
from app.cli.packing import pack
from app.cli.sending import Sender
from benchmarks.processes import Server, running

KEY = "tp-benchmark-0123456789"
MIB = 1024**2
TUS = {"Tus-Resumable": "1.0.0", "Authorization": f"Bearer {KEY}"}
CONTENT_TYPE = "application/offset+octet-stream"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    num_bytes = int(arguments.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        source = directory / "model.bin"
        write_random(source, num_bytes)
        with serving(directory) as (server, port):
            pid = server.process.pid
            print(f"app at rest: {resident_mb(pid):.0f} MB")
            for number in range(arguments.rounds):
                compare(directory, source, port, pid, number)


def compare(directory: Path, source: Path, port: int, pid: int, number: int) -> None:
    """One line for the disk, one for each way of uploading."""
    num_bytes = source.stat().st_size
    load = os.getloadavg()[0]
    disk = rate(num_bytes, lambda: copy_durably(source, directory / "copy"))
    (directory / "copy").unlink()
    print(f"round {number + 1}, load {load:.1f}: disk {disk:.0f} MB/s", flush=True)
    ways: dict[str, Callable[[], str]] = {
        "one PATCH": lambda: send_raw(port, source, num_bytes),
        "16 MiB pieces": lambda: send_raw(port, source, 16 * MIB),
        "tapeout push": lambda: push(source, directory / f"state{number}"),
    }
    for way, send in ways.items():
        with Watch(pid) as watch:
            made: list[str] = []
            speed = rate(num_bytes, lambda send=send, made=made: made.append(send()))
        print(
            f"  {way:14} {speed:5.0f} MB/s, {speed / disk:4.0%} of the disk's; app: "
            f"{watch.peak_mb:.0f} MB at most, {watch.cpu_seconds / num_bytes * 1e9:.2f} s CPU/GB",
            flush=True,
        )
        request(port, "DELETE", f"/api/uploads/{made[0]}", {})


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[tuple[Server, int]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        "from app.cli import main; main()",
        "serve",
        "--port",
        str(port),
    ]
    command += ["--data-dir", str(directory / "box")]
    url = f"http://127.0.0.1:{port}"
    environment = {"TAPEOUT_ADMIN_KEY": KEY, "TAPEOUT_LOG_LEVEL": "WARNING"}
    os.environ |= {"TAPEOUT_URL": url, "TAPEOUT_API_KEY": KEY}  # for the client
    log = directory / "app.log"
    with running("tapeout", command, url, "/readyz", log, environment) as server:
        yield server, port


# --- ways to move a file --------------------------------------------------------------------


def copy_durably(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        while data := reading.read(MIB):
            writing.write(data)
        writing.flush()
        os.fsync(writing.fileno())


def send_raw(port: int, source: Path, piece_bytes: int) -> str:
    """The upload's id. `sendfile` costs the client next to nothing, so the box's cost shows."""
    num_bytes = source.stat().st_size
    created = request(port, "POST", "/api/uploads", {"Upload-Length": str(num_bytes)})
    location = created.headers["Location"]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with source.open("rb") as file:
        for offset in range(0, num_bytes, piece_bytes):
            length = min(piece_bytes, num_bytes - offset)
            connection.putrequest("PATCH", location)
            headers = TUS | {"Upload-Offset": str(offset), "Content-Type": CONTENT_TYPE}
            for name, value in (headers | {"Content-Length": str(length)}).items():
                connection.putheader(name, value)
            connection.endheaders()
            connection.sock.sendfile(file, offset, length)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 204:
                raise SystemExit(f"PATCH: {answer.status}")
    connection.close()
    return location.rsplit("/", 1)[-1]


def push(source: Path, state: Path) -> str:
    os.environ["XDG_STATE_HOME"] = str(state)
    return Sender(Box(), pack(source, None)).send()


def request(port: int, method: str, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, headers=TUS | headers)
    answer = connection.getresponse()
    answer.read()
    if answer.status >= 300:
        raise SystemExit(f"{method} {path}: {answer.status}")
    return answer


def write_random(path: Path, num_bytes: int) -> None:
    with path.open("wb") as file:
        for offset in range(0, num_bytes, 16 * MIB):
            file.write(os.urandom(min(16 * MIB, num_bytes - offset)))
        file.flush()
        os.fsync(file.fileno())


# --- what is measured -----------------------------------------------------------------------


def rate(num_bytes: int, move: Callable[[], object]) -> float:
    """MB (10^6 bytes) a second."""
    start = time.perf_counter()
    move()
    return num_bytes / 1e6 / (time.perf_counter() - start)


class Watch:
    """The app's memory, sampled every 50 ms, and its CPU time. Page cache is not in it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.peak_mb = 0.0
        self.cpu_seconds = 0.0

    def _sample(self) -> None:
        while not self._is_over.wait(0.05):
            self.peak_mb = max(self.peak_mb, resident_mb(self._pid))

    def __enter__(self) -> "Watch":
        self.cpu_seconds = -cpu_seconds(self._pid)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_seconds += cpu_seconds(self._pid)
        self._is_over.set()
        self._thread.join()


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024 / 1e6


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
