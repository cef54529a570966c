"""Servers under measurement: started, found healthy, stopped while another has its turn."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 900.0


@dataclass
class Server:
    """One server with all its processes. `health_path` answers once it serves."""

    name: str
    url: str
    health_path: str
    process: subprocess.Popen[bytes]

    def signal(self, number: signal.Signals) -> None:
        """To the server and every process it started, directly or not."""
        for pid in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended while it started; see its log")
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(self.url + self.health_path, timeout=5).close()  # noqa: S310
                return
            time.sleep(0.5)
        raise SystemExit(f"{self.name} did not start in {START_SECONDS:.0f} s")


@contextlib.contextmanager
def running(
    name: str,
    command: list[str],
    url: str,
    health_path: str,
    log: Path,
    environment: dict[str, str],
    directory: Path | None = None,
) -> Iterator[Server]:
    """The server, healthy; killed with all it started in the end."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            cwd=directory,
            start_new_session=True,
        )
    server = Server(name, url, health_path, process)
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.signal(signal.SIGCONT)
        started = descendants(process.pid)  # some outlive the first of them
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def descendants(pid: int) -> list[int]:
    """The process and all below it, as they are now."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found
