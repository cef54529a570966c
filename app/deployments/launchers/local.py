"""Starts workers and builds as processes of this machine, each in a session of its own.

Owns their environment, sockets, private directories, captured output and memory limit. What they
may touch is confined by the sandbox that each process applies to itself.
"""

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import runtime
from app.core.storage import Storage
from app.deployments.launchers.base import Exit, Launch, LaunchError, StreamProtocol
from app.deployments.logs import LogFile

MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un.sun_path, less its terminating zero
CONNECT_POLL_SECONDS = 0.02
MEMORY_POLL_SECONDS = 0.25
KILL_SECONDS = 5.0  # how long the kernel may take to end a killed process

Command = Callable[[Launch, str], Sequence[str]]


def runtime_command(launch: Launch, socket_path: str) -> list[str]:
    """The data plane's own entry points. `-P` keeps the working directory off the import path."""
    return [sys.executable, "-P", "-m", f"runtime.{launch.role}", "--socket", socket_path]


def child_environment(
    num_threads: int, device: str, home: Path, environment: Mapping[str, str]
) -> dict[str, str]:
    """All that a child learns of its surroundings: an allow-list, never the app's own."""
    threads = str(num_threads)
    child = {
        "PATH": environment.get("PATH", os.defpath),
        "HOME": str(home),
        "TMPDIR": str(home),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONPATH": str(Path(runtime.__path__[0]).parent),
    }
    inherited = ["TAPEOUT_NATIVE_DIR"]
    if device.startswith("cuda"):
        inherited.append("CUDA_VISIBLE_DEVICES")
    child.update({name: environment[name] for name in inherited if name in environment})
    return child


class LocalLauncher:
    """Starts processes beside the app. `command` replaces the data plane's entry points."""

    def __init__(self, storage: Storage, *, command: Command = runtime_command) -> None:
        self._run_dir = storage.run_dir
        self._command = command
        self._socket_dir: Path | None = None
        self._is_own_socket_dir = False
        self._processes: set[LocalProcess] = set()

    def clean(self) -> None:
        current = {process.run_name for process in self._processes}
        for stale in self._run_dir.iterdir():
            if stale.name in current:
                continue
            if stale.is_dir() and not stale.is_symlink():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)

    async def start(self, launch: Launch) -> "LocalProcess":
        name = secrets.token_hex(4)
        home = self._run_dir / name / "home"
        try:
            socket_path = self._socket_path(name)
            home.mkdir(parents=True, mode=0o700)
            socket_path.parent.mkdir(exist_ok=True, mode=0o700)
            process = LocalProcess(
                launch, self._command(launch, str(socket_path)), socket_path, home
            )
        except OSError as error:
            shutil.rmtree(home.parent, ignore_errors=True)
            raise LaunchError(f"The {launch.role} process could not be started: {error}") from error
        self._processes.add(process)
        process.cleared.add_done_callback(lambda _: self._processes.discard(process))
        return process

    async def close(self) -> None:
        await asyncio.gather(*(process.stop(1.0) for process in list(self._processes)))
        if self._is_own_socket_dir and self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None

    def _socket_path(self, name: str) -> Path:
        """A socket's path must be short: a deep data directory gets its sockets elsewhere."""
        if self._socket_dir is None:
            self._socket_dir = self._choose_socket_dir()
        return self._socket_dir / name / "s"

    def _choose_socket_dir(self) -> Path:
        if _fits(self._run_dir):
            return self._run_dir
        for parent in (None, "/tmp"):  # noqa: S108
            with suppress(OSError):
                directory = Path(tempfile.mkdtemp(prefix="tapeout-", dir=parent))
                if _fits(directory):
                    self._is_own_socket_dir = True
                    return directory
                directory.rmdir()
        raise LaunchError(
            f"No directory is short enough for sockets: {self._run_dir} is too long and no "
            "temporary directory can be used. Choose a shorter data directory."
        )


def _fits(directory: Path) -> bool:
    return len(os.fsencode(directory / "01234567" / "s")) <= MAX_SOCKET_PATH_BYTES


class LocalProcess:
    """A child process, its process group, its log and its private directory."""

    def __init__(
        self, launch: Launch, command: Sequence[str], socket_path: Path, home: Path
    ) -> None:
        self._launch = launch
        self._socket_path = socket_path
        self._home = home
        self._log = LogFile(launch.log_path)
        self._is_stopping = False
        self._is_over_memory = False
        loop = asyncio.get_running_loop()
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            # Started from the loop's own thread: the kernel ends a sandboxed child when the
            # thread that started it ends.
            self._popen = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                cwd=home,
                env=child_environment(launch.num_threads, launch.device, home, os.environ),
                start_new_session=True,
            )
        except OSError:
            os.close(reading)
            self._log.close()
            raise
        finally:
            os.close(writing)
        self.name = f"pid {self._popen.pid}"
        self.run_name = home.parent.name
        self._yield_to_the_app()
        self._capture = threading.Thread(
            target=_capture, args=(reading, self._log), name=f"log {self.name}", daemon=True
        )
        self._capture.start()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self.cleared = loop.create_task(self._wait())
        self._watching = loop.create_task(self._watch_memory()) if launch.memory_bytes else None

    def path(self, path: Path) -> str:
        return str(path)

    def note(self, text: str) -> None:
        self._log.note(text)

    async def connect(
        self, make_protocol: Callable[[], StreamProtocol], timeout_seconds: float
    ) -> StreamProtocol:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while not self.exited.done():
            try:
                _, protocol = await loop.create_unix_connection(
                    make_protocol, str(self._socket_path)
                )
            except (FileNotFoundError, ConnectionRefusedError):
                if loop.time() > deadline:
                    raise LaunchError(
                        f"The {self._launch.role} did not open its stream within "
                        f"{timeout_seconds:.0f} seconds"
                    ) from None
                await asyncio.sleep(CONNECT_POLL_SECONDS)
            except OSError as error:
                raise LaunchError(f"The {self._launch.role} cannot be reached: {error}") from error
            else:
                self._socket_path.unlink(missing_ok=True)  # it accepts no second connection
                return protocol
        raise LaunchError(f"The {self._launch.role} {self.exited.result().explain()}")

    async def stop(self, grace_seconds: float) -> Exit:
        self._is_stopping = True
        if not self.exited.done():
            self._signal(signal.SIGTERM)
            await asyncio.wait([self.exited], timeout=grace_seconds)
        if not self.exited.done():
            self._signal(signal.SIGKILL)
            await asyncio.wait([self.exited], timeout=KILL_SECONDS)
        if not self.exited.done():
            # Stuck inside the kernel: it goes when the kernel lets it. Nobody waits for it.
            return Exit(code=-signal.SIGKILL, signal=signal.SIGKILL, is_stopped=True)
        await asyncio.wait([self.cleared], timeout=KILL_SECONDS)
        return self.exited.result()

    def _yield_to_the_app(self) -> None:
        """When memory runs out a child goes before the app, and a build lets requests go first."""
        with suppress(OSError):
            score = "1000" if self._launch.role == "build" else "500"
            Path(f"/proc/{self._popen.pid}/oom_score_adj").write_text(score)
        if self._launch.role == "build":
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._popen.pid, self._launch.niceness)

    def _signal(self, number: signal.Signals) -> None:
        """To the whole group; safe because its leader is not reaped before `exited` is set."""
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, number)

    async def _wait(self) -> None:
        await _ended(self._popen.pid)
        self._signal(signal.SIGKILL)  # whatever the process started goes with it
        code = self._popen.wait()
        if self._watching is not None:
            self._watching.cancel()
        self.exited.set_result(
            Exit(
                code=code,
                signal=max(0, -code),
                is_stopped=self._is_stopping,
                is_over_memory=self._is_over_memory,
            )
        )
        await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        self._capture.join(timeout=KILL_SECONDS)  # ends when the last writer of the pipe is gone
        self._log.close()
        shutil.rmtree(self._home.parent, ignore_errors=True)
        shutil.rmtree(self._socket_path.parent, ignore_errors=True)

    async def _watch_memory(self) -> None:
        """Sums up the session: a build's compilers count. Polling suits what a limit on address
        space does not: torch reserves far more than it uses."""
        while True:
            used = await asyncio.to_thread(session_memory_bytes, self._popen.pid)
            if used > self._launch.memory_bytes:
                self._is_over_memory = True
                self.note(f"[stopped: it used {used:,} of {self._launch.memory_bytes:,} bytes]")
                self._signal(signal.SIGKILL)
                return
            await asyncio.sleep(MEMORY_POLL_SECONDS)


def _capture(reading: int, log: LogFile) -> None:
    with open(reading, "rb", buffering=0) as pipe:
        while data := pipe.read(64 * 1024):
            log.write(data)


async def _ended(pid: int) -> None:
    """Returns once the process has ended, without reaping it."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):  # an older kernel, or a system other than Linux
        await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return
    has_ended = asyncio.Event()
    loop.add_reader(descriptor, has_ended.set)
    try:
        await has_ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def session_memory_bytes(session_id: int) -> int:
    """Resident bytes of every process of a session; shared pages count for each."""
    total = 0
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        with suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold anything, so fields are counted from its end.
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session_id:
                total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total
