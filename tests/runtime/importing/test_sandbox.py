"""Each denial is tried for real, in a child that confined itself."""

import json
import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from runtime.importing import landlock, seccomp

ROOT = Path(__file__).parents[3]
ABI = landlock.abi_version()

needs_landlock = pytest.mark.skipif(ABI == 0, reason="the kernel has no Landlock")
needs_seccomp = pytest.mark.skipif(
    not seccomp.is_supported(), reason="no seccomp filter for this kernel or architecture"
)

PRELUDE = """
import ctypes, json, os, signal, socket, subprocess, sys, tempfile, threading
from pathlib import Path
from runtime.importing import sandbox
box = Path(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
results = {}
def check(call):
    if call < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
def attempt(name, step):
    try:
        step()
    except Exception as error:
        results[name] = type(error).__name__
    else:
        results[name] = "done"
def finish():
    print(json.dumps(results), flush=True)
    os._exit(0)
"""

# Attempts that both profiles refuse.
HOSTILE = """
attempt("read passwd", lambda: open("/etc/passwd").read())
attempt("read secret", lambda: (box / "secret").read_text())
attempt("read parent environ", lambda: open(f"/proc/{os.getppid()}/environ", "rb").read())
attempt("read parent memory", lambda: open(f"/proc/{os.getppid()}/mem", "rb").read(1))
attempt("list parent files", lambda: os.listdir(f"/proc/{os.getppid()}/fd"))
attempt("list home", lambda: os.listdir(os.path.dirname(box)))
attempt("write outside", lambda: (box / "planted").write_text("x"))
attempt("write system", lambda: open("/usr/planted", "w"))
attempt("overwrite upload", lambda: open(box / "artifact" / "weights", "w"))
attempt("truncate secret", lambda: os.truncate(box / "secret", 0))
attempt("unlink secret", lambda: (box / "secret").unlink())
attempt("chown secret", lambda: os.chown(box / "secret", os.getuid(), os.getgid()))
attempt("tcp socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
attempt("udp socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
attempt("tcp6 socket", lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
attempt("netlink socket", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
attempt("unix datagrams", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
attempt("raw unix datagrams", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_RAW))
attempt("a pair of datagrams", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_RAW))
attempt("connect unix", lambda: socket.socket(socket.AF_UNIX).connect(str(box / "listener")))
attempt("signal parent", lambda: os.kill(os.getppid(), 0))
attempt("ptrace", lambda: check(libc.ptrace(16, os.getppid(), 0, 0)))
attempt("mount", lambda: check(libc.mount(b"none", str(box).encode(), b"tmpfs", 0, None)))
attempt("unshare", lambda: check(libc.unshare(0x10000000)))
attempt("userfaultfd", lambda: check(libc.syscall({userfaultfd}, 0)))
attempt("io_uring", lambda: check(libc.syscall(425, 1, 0)))
attempt("bpf", lambda: check(libc.syscall({bpf}, 0, 0, 0)))
attempt("shared memory", lambda: check(libc.shmget(0, 4096, 0o1600)))
attempt("attach shared memory", lambda: check(-(libc.shmat(0, None, 0o10000) == -1)))
attempt("semaphores", lambda: check(libc.semget(0, 1, 0o1600)))
attempt("message queue", lambda: check(libc.msgget(0, 0o1600)))
attempt("named message queue", lambda: check(libc.mq_open(b"/planted", 0o102, 0o600, None)))
attempt("slow parent", lambda: os.setpriority(
    os.PRIO_PROCESS, os.getppid(), os.getpriority(os.PRIO_PROCESS, os.getppid())))
attempt("slow group", lambda: os.setpriority(
    os.PRIO_PGRP, 0, os.getpriority(os.PRIO_PGRP, 0)))
attempt("move parent", lambda: os.sched_setaffinity(
    os.getppid(), os.sched_getaffinity(os.getppid())))
attempt("core dump", lambda: check(-1) if __import__("resource").getrlimit(4)[1] else None)
"""

# What a program that runs a model needs.
HARMLESS = """
attempt("read artifact", lambda: (box / "artifact" / "weights").read_text())
attempt("thread", lambda: (t := threading.Thread(target=int), t.start(), t.join()))
attempt("socketpair", socket.socketpair)
attempt("own status", lambda: open("/proc/self/status").read())
attempt("own maps", lambda: open("/proc/self/maps").read())
attempt("cpus", lambda: open("/sys/devices/system/cpu/online").read())
attempt("zone", lambda: __import__("zoneinfo").ZoneInfo("UTC"))
attempt("null", lambda: open(os.devnull, "w").write("x"))
attempt("urandom", lambda: open("/dev/urandom", "rb").read(1))
attempt("import", lambda: __import__("sqlite3"))
attempt("own priority", lambda: os.nice(1))
attempt("own cpus", lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)))
attempt("signal itself", lambda: os.kill(os.getpid(), 0))
"""

NUMBERS = {
    "x86_64": {"userfaultfd": 323, "bpf": 321},
    "aarch64": {"userfaultfd": 282, "bpf": 280},
}.get(platform.machine(), {"userfaultfd": -1, "bpf": -1})


@pytest.fixture
def box(tmp_path: Path) -> Path:
    box = tmp_path / "box"
    for name in ("artifact", "output", "tmp", "kv"):
        (box / name).mkdir(parents=True)
    (box / "artifact" / "weights").write_text("weights")
    (box / "secret").write_text("secret")
    return box


def run(box: Path, code: str, **options: object) -> dict[str, str]:
    script = PRELUDE + code.replace("{userfaultfd}", str(NUMBERS["userfaultfd"])).replace(
        "{bpf}", str(NUMBERS["bpf"])
    )
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(box)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,  # type: ignore[arg-type]
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


SERVE = """
report = sandbox.apply_serve(box / "artifact", kv_dir=box / "kv")
results["level"] = report.level
results["report"] = report.summary()
"""
BUILD = """
report = sandbox.apply_build(box / "artifact", box / "output", box / "tmp")
results["level"] = report.level
results["report"] = report.summary()
"""


@needs_landlock
@needs_seccomp
@pytest.mark.parametrize("profile", [SERVE, BUILD], ids=["serve", "build"])
def test_hostile_attempts_are_denied(box: Path, profile: str) -> None:
    results = run(box, profile + HOSTILE + "finish()")
    assert results.pop("level") == "L1"
    report = results.pop("report")
    assert "seccomp" in report
    assert f"landlock ABI {ABI}" in report
    assert results.pop("core dump") == "done"
    allowed = {name for name, outcome in results.items() if outcome not in DENIALS}
    assert not allowed, results
    assert (box / "secret").read_text() == "secret"
    assert not (box / "planted").exists()


@needs_landlock
@needs_seccomp
@pytest.mark.parametrize("abi", [abi for abi in (1, 2, 3, 4, 5) if abi < ABI])
@pytest.mark.parametrize("profile", [SERVE, BUILD], ids=["serve", "build"])
def test_older_kernels_deny_the_same(box: Path, profile: str, abi: int) -> None:
    older = f"from runtime.importing import landlock\nlandlock.abi_version = lambda: {abi}\n"
    everyone = 'attempt("signal everyone", lambda: os.kill(-1, 0))\n'
    results = run(box, older + profile + HOSTILE + everyone + "finish()")
    assert results.pop("level") == "L1"
    assert ("landlock truncate" in results.pop("report")) == (abi < 3)
    assert results.pop("core dump") == "done"
    assert set(results.values()) <= set(DENIALS), results


DENIALS = ("PermissionError", "OSError")


@needs_landlock
@needs_seccomp
@pytest.mark.parametrize("profile", [SERVE, BUILD], ids=["serve", "build"])
def test_what_a_model_needs_still_works(box: Path, profile: str) -> None:
    results = run(box, profile + HARMLESS + "finish()")
    results.pop("level")
    results.pop("report")
    assert set(results.values()) == {"done"}, results


@needs_landlock
@needs_seccomp
def test_serve_writes_only_its_kv_directory_and_starts_nothing(box: Path) -> None:
    results = run(
        box,
        SERVE
        + """
attempt("write kv", lambda: (box / "kv" / "block").write_text("x"))
attempt("write output", lambda: (box / "output" / "x").write_text("x"))
attempt("write tmp", lambda: open("/tmp/planted", "w"))
attempt("write shm", lambda: open("/dev/shm/planted", "w"))
attempt("run", lambda: subprocess.run(["/bin/true"]))
attempt("spawn", lambda: os.posix_spawn("/bin/true", ["true"], {}))
attempt("fork", os.fork)
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("chmod", lambda: os.chmod(box / "secret", 0o777))
attempt("signal everyone", lambda: os.kill(-1, 0))
attempt("limit parent", lambda: __import__("resource").prlimit(os.getppid(), 7))
finish()
""",
    )
    assert results.pop("write kv") == "done"
    del results["level"], results["report"]
    assert set(results.values()) == {"PermissionError"}, results


@needs_landlock
@needs_seccomp
def test_build_runs_programs_and_writes_only_its_directories(box: Path) -> None:
    own = box / "tmp" / "tool"
    results = run(
        box,
        BUILD
        + f"""
attempt("write output", lambda: (box / "output" / "x").write_text("x"))
attempt("temporary file", lambda: tempfile.NamedTemporaryFile().write(b"x"))
attempt("run", lambda: subprocess.run(["/bin/true"], check=True))
Path({str(own)!r}).write_bytes(Path("/bin/true").read_bytes())
attempt("run own", lambda: subprocess.run(
    ["/lib64/ld-linux-x86-64.so.2", {str(own)!r}] if os.path.exists("/lib64/ld-linux-x86-64.so.2")
    else ["/bin/true"], check=True))
attempt("child reads passwd", lambda: subprocess.run(["/bin/cat", "/etc/passwd"], check=True,
    stderr=subprocess.DEVNULL))
attempt("run upload", lambda: subprocess.run([str(box / "artifact" / "weights")]))
attempt("write kv", lambda: (box / "kv" / "x").write_text("x"))
attempt("write shm", lambda: open("/dev/shm/planted", "w"))
os.chmod(box / "secret", 0o777)
results["mode"] = oct((box / "secret").stat().st_mode & 0o777)
finish()
""",
    )
    assert results["write output"] == "done"
    assert results["temporary file"] == "done"
    assert results["run"] == "done"
    assert results["run own"] == "done"
    assert results["child reads passwd"] == "CalledProcessError"
    assert results["run upload"] == "PermissionError"
    assert results["write kv"] == "PermissionError"
    assert results["write shm"] == "PermissionError"
    assert results["mode"] != "0o777"


@needs_seccomp
def test_without_landlock_the_level_says_so(box: Path) -> None:
    results = run(
        box,
        "from runtime.importing import landlock\nlandlock.abi_version = lambda: 0\n"
        + SERVE
        + 'attempt("read passwd", lambda: open("/etc/passwd").read())\nfinish()',
    )
    assert results["level"] == "L0"
    assert "missing: landlock (absent" in results["report"]
    assert results["read passwd"] == "done"


@needs_landlock
@needs_seccomp
@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize("has_namespaces", [True, False])
def test_an_ordinary_user_is_confined_too(box: Path, has_namespaces: bool) -> None:
    for path in (box, *box.iterdir(), *box.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    code = "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
    code += "check(libc.prctl(4, 1, 0, 0, 0))\n"  # dumpable again, as after an exec
    if not has_namespaces:
        code += (
            "def refused(): raise PermissionError(1, 'Operation not permitted')\n"
            "sandbox._enter_namespaces = refused\n"
        )
    results = run(box, code + SERVE + HOSTILE + "finish()")
    assert results.pop("level") == "L1"
    report = results.pop("report")
    if not has_namespaces:
        assert "missing: network and IPC namespaces (Operation not permitted)" in report
    assert results.pop("core dump") == "done"
    assert set(results.values()) <= set(DENIALS), results


def test_applying_after_threads_started_is_refused(box: Path) -> None:
    results = run(
        box,
        """
threading.Thread(target=threading.Event().wait, daemon=True).start()
attempt("late", lambda: sandbox.apply_serve(box / "artifact"))
finish()
""",
    )
    assert results == {"late": "SandboxError"}


def test_it_dies_with_its_parent(box: Path) -> None:
    """The parent starts a confined child, tells its pid and is killed: the pipe closes."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(box)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "confined\n"
    parent.kill()
    assert parent.stdout.read() == ""  # ends only when the child, which shares it, is gone
    parent.wait()
    parent.stdout.close()


PARENT = """
import subprocess, sys
child = '''
import sys, time
from pathlib import Path
from runtime.importing import sandbox
sandbox.apply_serve(Path(sys.argv[1]) / "artifact")
print("confined", flush=True)
time.sleep(60)
'''
subprocess.run([sys.executable, "-c", child, sys.argv[1]])
"""


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("profile", ["build", "serve"])
@pytest.mark.parametrize("signals_to", [None, 1])
def test_the_filter_program_is_well_formed(
    machine: str, profile: seccomp.Profile, signals_to: int | None
) -> None:
    """Every jump lands inside the program, and every path ends in a return."""
    code = seccomp.program(profile, signals_to, machine)
    assert len(code) % 8 == 0
    length = len(code) // 8
    assert length < 4096  # the kernel's limit
    instructions = [
        (
            int.from_bytes(code[at : at + 2], "little"),
            code[at + 2],
            code[at + 3],
        )
        for at in range(0, len(code), 8)
    ]
    for at, (opcode, if_true, if_false) in enumerate(instructions):
        assert at + 1 + max(if_true, if_false) < length or opcode == 0x06
    assert instructions[-1][0] == 0x06
