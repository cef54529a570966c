import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from app.core.storage import Storage
from app.deployments.launchers.base import Exit, Launch, LaunchError
from app.deployments.launchers.local import (
    MAX_SOCKET_PATH_BYTES,
    LocalLauncher,
    child_environment,
    runtime_command,
    session_memory_bytes,
)
from app.deployments.link import ReplicaLink
from app.deployments.logs import read_log
from runtime.protocol import SequenceOutput, Serve
from tests.app.deployments.conftest import Script, until

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


async def commit(outputs: list[SequenceOutput]) -> None:
    pass


async def connected(launcher: LocalLauncher, launch: Launch) -> tuple[ReplicaLink, object]:
    process = await launcher.start(launch)
    link = ReplicaLink(commit)
    await process.connect(lambda: link.stream, 10)
    await link.serve(Serve(artifact_dir="/nowhere"), 10)
    return link, process


async def test_a_child_learns_nothing_of_the_app(
    launcher: LocalLauncher,
    launch: Launch,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    canary = "canary-7f3a"
    for name in ("TAPEOUT_ADMIN_KEY", "TAPEOUT_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "XYZ"):
        monkeypatch.setenv(name, canary)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("TAPEOUT_NATIVE_DIR", "/native")
    inherited = os.open(tmp_path / "secret", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(inherited, True)
    script["report"] = str(tmp_path / "report.json")
    link, process = await connected(launcher, launch)
    os.close(inherited)
    seen = json.loads((tmp_path / "report.json").read_text())
    assert canary not in json.dumps(seen)
    environment = seen["environment"]
    assert set(environment) <= {
        *("PATH", "HOME", "TMPDIR", "LANG", "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONNOUSERSITE"),
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY"),
        *("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "TAPEOUT_NATIVE_DIR", "LC_CTYPE"),
    }
    assert environment["TAPEOUT_NATIVE_DIR"] == "/native"
    assert Path(environment["HOME"]).parts[-1] == "home"
    assert seen["cwd"] == environment["HOME"] != os.environ["HOME"]
    assert seen["session"] == seen["group"] == seen["pid"] != seen["parent_session"]
    assert seen["descriptors"]["0"] == "/dev/null"
    assert "secret" not in str(seen["descriptors"])
    others = [target for number, target in seen["descriptors"].items() if int(number) > 2]
    assert all(target.startswith("socket:") for target in others), others
    await process.stop(1)
    link.close("done")
    assert not os.path.exists(environment["HOME"])  # noqa: ASYNC240


def test_a_device_is_named_only_to_who_runs_on_it(tmp_path: Path) -> None:
    app = {"CUDA_VISIBLE_DEVICES": "1", "PATH": "/bin"}
    assert "CUDA_VISIBLE_DEVICES" not in child_environment(1, "cpu", tmp_path, app)
    environment = child_environment(3, "cuda:0", tmp_path, app)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_data_plane_is_started_by_module_name(launch: Launch) -> None:
    assert runtime_command(launch, "/s")[1:] == ["-P", "-m", "runtime.worker", "--socket", "/s"]


async def test_output_is_captured(launcher: LocalLauncher, launch: Launch) -> None:
    link, process = await connected(launcher, launch)
    process.note("a line of ours")
    await process.stop(1)
    link.close("done")
    text = read_log(launch.log_path).text
    assert "serving /nowhere" in text
    assert "a line of ours" in text


async def test_stopping_ends_even_a_process_that_ignores_it(
    storage: Storage, launch: Launch
) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on'); time.sleep(60)"
    launcher = LocalLauncher(storage, command=lambda *_: [sys.executable, "-u", "-c", code])
    process = await launcher.start(launch)
    await until(lambda: "on" in read_log(launch.log_path).text)
    ended = await process.stop(0.1)
    assert (ended.signal, ended.is_stopped) == (signal.SIGKILL, True)
    assert (await process.stop(0.1)).signal == signal.SIGKILL  # twice is fine
    assert not list(storage.run_dir.iterdir())
    await launcher.close()


async def test_what_a_process_started_ends_with_it(storage: Storage, launch: Launch) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    launcher = LocalLauncher(storage, command=lambda *_: [sys.executable, "-c", code])
    process = await launcher.start(launch)
    ended = await asyncio.wait_for(asyncio.shield(process.exited), 20)
    assert (ended.code, ended.is_stopped) == (0, False)
    child = int(read_log(launch.log_path).text)
    await until(lambda: _is_gone(child))
    await launcher.close()


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def test_a_process_that_ends_before_it_listens(storage: Storage, launch: Launch) -> None:
    launcher = LocalLauncher(storage, command=lambda *_: [sys.executable, "-c", "exit(3)"])
    process = await launcher.start(launch)
    with pytest.raises(LaunchError, match="The worker ended unexpectedly with exit code 3"):
        await process.connect(asyncio.Protocol, 20)
    await launcher.close()


async def test_a_process_that_never_listens(
    launcher: LocalLauncher, launch: Launch, script: Script
) -> None:
    script["no_socket"] = True
    process = await launcher.start(launch)
    with pytest.raises(LaunchError, match="did not open its stream within 0 seconds"):
        await process.connect(asyncio.Protocol, 0.1)


async def test_a_program_that_is_not_there(storage: Storage, launch: Launch) -> None:
    launcher = LocalLauncher(storage, command=lambda *_: ["/no/such/program"])
    with pytest.raises(LaunchError, match="could not be started"):
        await launcher.start(launch)
    assert not list(storage.run_dir.iterdir())


async def test_memory_is_limited(storage: Storage) -> None:
    code = "import time; x = b'x' * 300_000_000; time.sleep(60)"
    launcher = LocalLauncher(storage, command=lambda *_: [sys.executable, "-c", code])
    launch = Launch(
        role="build", log_path=storage.log("b"), num_threads=1, memory_bytes=100 * 1024**2
    )
    process = await launcher.start(launch)
    ended = await asyncio.wait_for(asyncio.shield(process.exited), 20)
    assert ended.is_over_memory
    assert "needed more memory" in ended.explain()
    await launcher.close()
    assert "of 104,857,600 bytes" in read_log(launch.log_path).text


def test_memory_of_a_session_counts_every_process() -> None:
    assert session_memory_bytes(os.getsid(0)) > 10 * 1024**2
    assert session_memory_bytes(2**22 + 1) == 0


async def test_a_deep_data_directory_gets_its_sockets_elsewhere(
    tmp_path: Path, script: Script
) -> None:
    storage = Storage(tmp_path / ("d" * 120) / "data")
    launcher = LocalLauncher(storage, command=script.command)
    launch = Launch(role="worker", log_path=storage.log("a"), num_threads=1)
    link, _ = await connected(launcher, launch)
    elsewhere = launcher._socket_dir
    assert elsewhere is not None
    assert len(os.fsencode(elsewhere / "01234567" / "s")) <= MAX_SOCKET_PATH_BYTES
    assert elsewhere.stat().st_mode & 0o777 == 0o700
    await launcher.close()
    link.close("done")
    assert not elsewhere.exists()


async def test_nowhere_is_short_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path / ("d" * 120) / "data")
    monkeypatch.setattr("tempfile.mkdtemp", _refuse)
    launch = Launch(role="worker", log_path=storage.log("a"), num_threads=1)
    with pytest.raises(LaunchError, match="Choose a shorter data directory"):
        await LocalLauncher(storage).start(launch)


def _refuse(**_: object) -> str:
    raise PermissionError


def test_what_a_dead_app_left_is_removed(storage: Storage) -> None:
    (storage.run_dir / "0a" / "home").mkdir(parents=True)
    (storage.run_dir / "0a" / "s").touch()
    (storage.run_dir / "s").touch()
    LocalLauncher(storage).clean()
    assert not list(storage.run_dir.iterdir())


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (Exit(code=-9, signal=9), "most likely because the machine ran out of memory"),
        (Exit(code=-11, signal=11), "segmentation fault"),
        (Exit(code=-31, signal=31), "sandbox forbids"),
        (Exit(code=-40, signal=40), "signal 40"),
        (Exit(code=2), "exit code 2"),
        (Exit(code=0), "without an answer"),
        (Exit(code=-15, signal=15, is_stopped=True), "was stopped"),
    ],
)
def test_ends_are_explained_in_plain_words(ended: Exit, words: str) -> None:
    assert words in ended.explain()
