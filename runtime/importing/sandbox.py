"""The two sandbox profiles a process applies to itself before it touches an upload.

Owns what *build* and *serve* may do and the honest account of what the kernel really enforces.
The mechanisms are in `landlock.py` and `seccomp.py`; what a process is given from outside (an
environment without secrets, a container, a cgroup) is the launcher's. Standard library only, so
that it can run before anything starts a thread.
"""

import ctypes
import os
import resource
import signal
import site
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from runtime.importing import landlock, seccomp

Level = Literal["L0", "L1", "L2"]

_CODE_DIR = Path(__file__).resolve().parents[1]  # the `runtime` package, never its neighbours
_GIB = 1024**3
OOM_SCORE = 500  # at least

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
_CAPABILITY_VERSION_3 = 0x20080522

_SYSTEM_DIRS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
# Named one by one: the rest of /etc holds the machine's users, keys and addresses.
_SYSTEM_FILES = (
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload"),
    *("/etc/localtime", "/etc/timezone", "/etc/locale.alias", "/etc/mime.types"),
    *("/etc/ssl/openssl.cnf", "/etc/alternatives"),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/filesystems"),
    *("/proc/sys/vm", "/proc/sys/kernel/osrelease", "/proc/sys/kernel/ngroups_max"),
    *("/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/fs/cgroup"),
    *("/sys/kernel/mm/transparent_hugepage", "/sys/kernel/mm/hugepages"),
    *("/dev/urandom", "/dev/random"),
)
_CUDA_FILES = (
    *("/sys/bus", "/sys/class", "/sys/devices", "/sys/module/nvidia", "/sys/module/nvidia_uvm"),
    *("/proc/driver", "/proc/devices", "/proc/modules", "/etc/nvidia"),
)


class SandboxError(Exception):
    """The sandbox cannot be applied to this process at all."""


class IsolationReport(msgspec.Struct, frozen=True):
    """What holds, as seen after it was applied. `missing` names what does not, and why.

    L0: files or system calls are not confined. L1: both are, without capabilities. L2: L1 in
    process, network and IPC namespaces of its own (a container whose first process this is).
    """

    level: Level
    mechanisms: list[str]
    missing: list[str]

    def summary(self) -> str:
        """One line for a log or a receipt."""
        missing = f"; missing: {', '.join(self.missing)}" if self.missing else ""
        return f"isolation {self.level} ({', '.join(self.mechanisms) or 'nothing'}){missing}"


def apply_build(
    upload: Path,
    output_dir: Path,
    tmp_dir: Path,
    *,
    device: str = "cpu",
    max_file_bytes: int = 64 * _GIB,
    address_space_bytes: int | None = None,
) -> IsolationReport:
    """Confine this process for good to reading `upload` and writing `output_dir` and `tmp_dir`.

    A compiler may run: programs start from the system, the interpreter and `tmp_dir`, which
    becomes the home and temporary directory. Raises `SandboxError` when threads already run.
    """
    rules = [
        *_system_rules(device, landlock.READ | landlock.EXECUTE),
        (upload, landlock.READ),
        (output_dir, landlock.READ | landlock.WRITE),
        (tmp_dir, landlock.READ | landlock.WRITE | landlock.EXECUTE),
    ]
    os.environ.update(TMPDIR=str(tmp_dir), HOME=str(tmp_dir), XDG_CACHE_HOME=str(tmp_dir))
    tempfile.tempdir = None
    return _apply("build", rules, max_file_bytes, address_space_bytes)


def apply_serve(
    artifact_dir: Path,
    *,
    kv_dir: Path | None = None,
    device: str = "cpu",
    max_file_bytes: int = _GIB,
    address_space_bytes: int | None = None,
) -> IsolationReport:
    """Confine this process for good to reading `artifact_dir` and writing `kv_dir`, if given.

    It can start no program and no process. Raises `SandboxError` when threads already run.
    """
    rules = [*_system_rules(device, landlock.READ), (artifact_dir, landlock.READ)]
    # Libraries insist on a temporary directory that exists when they load; this one takes no file.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.tempdir = "/"
    if kv_dir is not None:
        rules.append((kv_dir, landlock.READ | landlock.WRITE))
    return _apply("serve", rules, max_file_bytes, address_space_bytes)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        raise SystemExit(1)


# --- what may be read -------------------------------------------------------------------


def _system_rules(device: str, access: int) -> list[tuple[Path, int]]:
    """Interpreter, libraries, this package, and the few system files that they read."""
    packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages", ".zip"))]
    code = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, *packages}
    if site.ENABLE_USER_SITE and site.USER_SITE:
        code.add(site.USER_SITE)
    code.add(os.environ.get("TAPEOUT_NATIVE_DIR", ""))  # where the C++ op was compiled to
    code -= {"", "/"}
    read_only = [*sorted(code), str(_CODE_DIR), *_SYSTEM_DIRS]
    rules = [(Path(path), access) for path in read_only]
    rules += [(Path(path), landlock.READ) for path in _SYSTEM_FILES]
    rules += [
        (Path(f"/proc/{os.getpid()}"), landlock.READ),
        (Path("/dev/null"), landlock.READ | landlock.WRITE),
        (Path("/dev/zero"), landlock.READ | landlock.WRITE),
    ]
    return rules + (_cuda_rules() if device.startswith("cuda") else [])


def _cuda_rules() -> list[tuple[Path, int]]:
    """The driver's nodes and files. It names its threads through /proc, hence the write there."""
    nodes = [*Path("/dev").glob("nvidia*"), Path("/dev/nvidia-caps")]
    on_nodes = landlock.READ | landlock.WRITE_FILE | landlock.IOCTL_DEV
    return [
        *((node, on_nodes) for node in nodes),
        *((Path(path), landlock.READ) for path in _CUDA_FILES),
        (Path(f"/proc/{os.getpid()}/task"), landlock.READ | landlock.WRITE_FILE),
    ]


# --- applying ---------------------------------------------------------------------------


def _apply(
    profile: seccomp.Profile,
    rules: list[tuple[Path, int]],
    max_file_bytes: int,
    address_space_bytes: int | None,
) -> IsolationReport:
    if len(os.listdir("/proc/self/task")) > 1:
        raise SandboxError("the sandbox must be applied before the process starts any thread")
    os.umask(0o077)
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime would write and send some
    os.environ.setdefault("USER", "tapeout")  # the user database is out of reach from here on
    held: list[str] = []
    missing: list[str] = []

    def attempt(name: str, step: Callable[[], object]) -> bool:
        try:
            step()
        except OSError as error:
            missing.append(f"{name} ({error.strerror})")
            return False
        held.append(name)
        return True

    attempt("no_new_privs", lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1))
    attempt("rlimits", lambda: _limit(max_file_bytes, address_space_bytes))
    attempt("first to go when memory runs out", _yield_memory)
    has_no_network = attempt("network and IPC namespaces", _enter_namespaces) or _is_offline()
    has_no_capabilities = attempt("no capabilities", _drop_capabilities)
    abi = landlock.abi_version()
    has_landlock = _restrict_files(rules, abi, held, missing)
    # A build ends its compilers; only Landlock can tell them from strangers.
    is_scoped = profile == "build" and abi >= landlock.ABI_WITH_SIGNAL_SCOPE
    signals_to = None if is_scoped else os.getpid()
    if seccomp.is_supported():
        has_seccomp = attempt("seccomp", lambda: seccomp.install(profile, signals_to=signals_to))
    else:
        has_seccomp = False
        missing.append("seccomp (not supported by this kernel or architecture)")
    die_with_parent()
    held.append("dies with its parent")
    is_confined = has_landlock and has_seccomp and has_no_capabilities
    is_alone = has_no_network and os.getpid() == 1
    level: Level = "L0" if not is_confined else "L2" if is_alone else "L1"
    return IsolationReport(level=level, mechanisms=held, missing=missing)


# Descriptors that keep a rule alive: see `landlock.restrict`.
_pinned: list[int] = []


def _restrict_files(
    rules: list[tuple[Path, int]], abi: int, held: list[str], missing: list[str]
) -> bool:
    """Apply Landlock, and name what an older one lacks that nothing else makes up for."""
    if abi == 0:
        missing.append("landlock (absent from this kernel or switched off)")
        return False
    try:
        _pinned.extend(landlock.restrict(rules, abi))
    except OSError as error:
        missing.append(f"landlock ({error.strerror})")
        return False
    held.append(f"landlock ABI {abi}")
    if abi < landlock.ABI_WITH_TRUNCATE:
        missing.append(f"landlock truncate (needs ABI {landlock.ABI_WITH_TRUNCATE})")
    if not seccomp.is_supported() and abi < landlock.ABI_WITH_SIGNAL_SCOPE:
        missing.append(f"landlock TCP and signals (need ABI {landlock.ABI_WITH_SIGNAL_SCOPE})")
    return True


_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), *([ctypes.c_ulong(0)] * 3)))


def _enter_namespaces() -> None:
    """A network without interfaces and IPC objects of its own; needs root or user namespaces."""
    try:
        _check(_libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC))
    except PermissionError:
        user, group = os.getuid(), os.getgid()
        _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _is_offline() -> bool:
    """Whether the container this runs in has no network interface but the loopback."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return all(line.split(":")[0].strip() == "lo" for line in lines)


def _limit(max_file_bytes: int, address_space_bytes: int | None) -> None:
    """Resource limits. The address space is left alone unless asked: CUDA reserves terabytes."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: max_file_bytes,
        resource.RLIMIT_NOFILE: 4096,
        resource.RLIMIT_NPROC: 4096,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if address_space_bytes is not None:
        limits[resource.RLIMIT_AS] = address_space_bytes
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(limit, (value, value))


def _yield_memory() -> None:
    """First to go when the machine runs out of memory; the rest of the box must live."""
    score = Path("/proc/self/oom_score_adj")
    if int(score.read_text()) < OOM_SCORE:
        score.write_text(str(OOM_SCORE))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def _drop_capabilities() -> None:
    """Give up every capability, and the way back to them through a program run as root."""
    header = _CapabilityHeader(version=_CAPABILITY_VERSION_3, pid=0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low half, then high half
    _check(_libc.capget(ctypes.byref(header), sets))
    if not any(sets):
        return
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        _prctl(_PR_CAPBSET_DROP, capability)
    _check(_libc.capset(ctypes.byref(header), (ctypes.c_uint32 * 6)()))
