"""What `tapeout doctor` looks at: each thing a box needs, how it stands, and what mends it.

Owns the checks; a check never changes anything and never takes long. Layer: beside `main`, since it
looks at every part.
"""

import asyncio
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

import httpx
import msgspec
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.core import clock
from app.core.database import create_writer_engine
from app.core.storage import Storage
from app.deployments.launchers.base import LaunchError
from app.deployments.launchers.docker import DockerLauncher
from app.settings import Settings

Verdict = Literal["ok", "note", "fail"]
COMMAND_SECONDS = 60
LOW_DISK_BYTES = 10 * 1024**3
MIN_DISK_BYTES = 512 * 1024**2
LOW_MEMORY_BYTES = 4 * 1024**3
MAX_SKEW_SECONDS = 60
STRIPE = "https://api.stripe.com"

# Run in a process of its own: the control plane never loads torch.
_PROBE = """
import json, sys
found = {}
try:
    import torch
    found["torch"] = torch.__version__
    found["cuda"] = torch.cuda.is_available()
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    from runtime.execution.native import find_compiler, library_path, variants
    found["compiler"] = find_compiler()
    found["variants"] = [v.name for v in variants() if v.is_supported and library_path(v).exists()]
    from runtime.importing import landlock
    found["landlock"] = landlock.abi_version()
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


class Finding(msgspec.Struct, frozen=True):
    """How one thing stands. `fix` says what to do where it is not `ok`; a `note` costs something
    but stops nothing."""

    name: str
    verdict: Verdict
    detail: str
    fix: str = ""


class Probe(msgspec.Struct, frozen=True):
    """What the data plane's own libraries say of this machine."""

    torch: str = ""
    cuda: bool = False
    gpus: list[str] = []
    compiler: str | None = None
    variants: list[str] = []
    landlock: int = 0
    error: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """One finding after another, as they are made."""
    yield check_python()
    probe = run_probe()
    yield check_torch(probe)
    yield check_device(settings, probe)
    yield check_operators(probe)
    yield check_compiler(probe)
    yield check_sandbox(settings, probe)
    yield check_memory()
    yield check_data_dir(settings)
    yield check_disk(settings)
    yield check_database(settings)
    yield check_clock(settings)
    yield check_port(settings)
    yield check_launcher(settings)
    yield check_stripe(settings)


def check_python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", "ok", version)
    return Finding("Python", "fail", version, "install Python 3.11, 3.12 or 3.13")


def run_probe(run: Callable[..., "subprocess.CompletedProcess[str]"] = subprocess.run) -> Probe:
    try:
        done = run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        return msgspec.convert(json.loads(done.stdout.strip().splitlines()[-1]), Probe)
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return Probe(error=f"{type(error).__name__}: {error}")


def check_torch(probe: Probe) -> Finding:
    if probe.torch:
        return Finding("PyTorch", "ok", probe.torch)
    return Finding("PyTorch", "fail", probe.error, "run make setup, or pip install torch==2.13.0")


def check_device(settings: Settings, probe: Probe) -> Finding:
    """The GPU that is asked for, or one that is not used."""
    driver = _nvidia_driver()
    if settings.device.startswith("cuda"):
        if probe.cuda:
            return Finding("GPU", "ok", f"{', '.join(probe.gpus)} (driver {driver or 'unknown'})")
        if not driver:
            return Finding(
                "GPU", "fail", "no NVIDIA driver answers", "install it, or set TAPEOUT_DEVICE=cpu"
            )
        return Finding(
            *("GPU", "fail", f"driver {driver}, but PyTorch {probe.torch} cannot use it"),
            "install a CUDA build of PyTorch (make setup TORCH=...), or set TAPEOUT_DEVICE=cpu",
        )
    if driver:
        return Finding(
            "GPU", "note", f"there is one (driver {driver}) and models run on the CPU",
            "set TAPEOUT_DEVICE=cuda",
        )  # fmt: skip
    return Finding("GPU", "ok", "none; models run on the CPU")


def _nvidia_driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(  # noqa: S603 - found on the path, fixed arguments
            query, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def check_operators(probe: Probe) -> Finding:
    if probe.variants:
        return Finding("C++ operators", "ok", ", ".join(probe.variants))
    return Finding(
        *("C++ operators", "note", "not compiled: decoders run several times slower on this CPU"),
        "run python -m runtime.execution.native (needs g++)",
    )


def check_compiler(probe: Probe) -> Finding:
    if probe.compiler:
        return Finding("C++ compiler", "ok", probe.compiler)
    return Finding(
        *("C++ compiler", "note", "none: AOTInductor is not tried when models are optimised"),
        "install g++",
    )


def check_sandbox(settings: Settings, probe: Probe) -> Finding:
    if settings.launcher == "docker":
        return Finding("Sandbox", "ok", "containers, and Landlock in them where there is")
    if probe.landlock:
        return Finding("Sandbox", "ok", f"Landlock {probe.landlock}, seccomp")
    return Finding(
        *("Sandbox", "note", "this kernel has no Landlock: builds can read the box's files"),
        "use Linux 5.13 or newer with Landlock, or TAPEOUT_LAUNCHER=docker",
    )


def check_memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{total / 1024**3:.0f} GiB"
    if total >= LOW_MEMORY_BYTES:
        return Finding("Memory", "ok", detail)
    return Finding("Memory", "note", detail, "builds of larger models need more than 4 GiB")


def check_data_dir(settings: Settings) -> Finding:
    directory = settings.data_dir
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = directory / ".doctor"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return Finding(
            "Data directory", "fail", f"{directory}: {error.strerror}",
            f"give user {os.getuid()} the right to write there, or choose TAPEOUT_DATA_DIR",
        )  # fmt: skip
    if directory.stat().st_mode & 0o077:
        return Finding(
            *("Data directory", "note", f"{directory} can be read by others"),
            f"chmod 700 {directory}",
        )
    return Finding("Data directory", "ok", str(directory))


def check_disk(settings: Settings) -> Finding:
    existing = next(p for p in (settings.data_dir, *settings.data_dir.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / 1024**3:.1f} GiB free"
    if free < MIN_DISK_BYTES:
        return Finding("Disk", "fail", detail, "make room: the box does not start below 0.5 GiB")
    if free < LOW_DISK_BYTES:
        return Finding("Disk", "note", detail, "models need room for upload, artifact and build")
    return Finding("Disk", "ok", detail)


def check_database(settings: Settings) -> Finding:
    url = settings.sync_database_url
    if settings.is_sqlite:
        path = Path(url.removeprefix("sqlite:///"))
        if not path.exists():
            return Finding("Database", "ok", f"SQLite, made at the first start in {path}")
    engine = create_writer_engine(url).execution_options(sqlite_begin="")
    try:
        with engine.connect() as connection:
            query = "SELECT sqlite_version()" if settings.is_sqlite else "SHOW server_version"
            version = connection.scalar(text(query))
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        fix = "start the database, or correct TAPEOUT_DATABASE_URL"
        return Finding("Database", "fail", reason, fix)
    finally:
        engine.dispose()
    return Finding(
        "Database", "ok", f"{'SQLite' if settings.is_sqlite else 'PostgreSQL'} {version}"
    )


def check_clock(settings: Settings) -> Finding:
    """Against the database's machine, or Stripe's where the database is a file."""
    other, who = _other_time(settings)
    if other is None:
        return Finding("Clock", "ok", "nothing to compare it with")
    skew = abs(time.time() - other)
    if skew <= MAX_SKEW_SECONDS:
        return Finding("Clock", "ok", f"within {skew:.0f} s of {who}")
    return Finding(
        *("Clock", "fail", f"{skew:.0f} s away from {who}"),
        "run an NTP client: webhooks are refused and prices by the hour are wrong",
    )


def _other_time(settings: Settings) -> tuple[float | None, str]:
    if not settings.is_sqlite:
        engine = create_writer_engine(settings.sync_database_url)
        try:
            with engine.connect() as connection:
                return float(connection.scalar(text("SELECT extract(epoch FROM now())")) or 0), (
                    "the database"
                )
        except SQLAlchemyError:
            return None, ""
        finally:
            engine.dispose()
    if not settings.stripe_api_key:
        return None, ""
    try:
        date = httpx.head(settings.stripe_api_base or STRIPE, timeout=10).headers.get("date", "")
        return parsedate_to_datetime(date).timestamp(), "Stripe"
    except (httpx.HTTPError, ValueError, TypeError):
        return None, ""


def check_port(settings: Settings) -> Finding:
    name = f"{settings.host}:{settings.port}"
    try:
        answer = httpx.get(f"http://127.0.0.1:{settings.port}/healthz", timeout=5)
        if answer.status_code == 200 and answer.json() == {"status": "ok"}:
            return Finding("Port", "ok", f"a box answers at {name}")
    except (httpx.HTTPError, ValueError):
        pass
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            fix = "stop what uses it, or choose TAPEOUT_PORT"
            return Finding("Port", "fail", f"{name}: {error.strerror}", fix)
    return Finding("Port", "ok", f"{name} is free")


def check_launcher(settings: Settings) -> Finding:
    if settings.launcher == "local":
        return Finding("Launcher", "ok", "processes of this machine")
    launcher = DockerLauncher(Storage(settings.data_dir), settings.launcher_socket)
    try:
        running = asyncio.run(launcher.status())
    except LaunchError as error:
        fix = "start its container (compose.yaml has it), or set TAPEOUT_LAUNCHER=local"
        return Finding("Launcher", "fail", str(error), fix)
    if running.problem:
        return Finding("Launcher", "fail", running.problem, "start the Docker engine")
    return Finding("Launcher", "ok", f"Docker, {len(running.names)} containers run")


def check_stripe(settings: Settings) -> Finding:
    if not settings.stripe_api_key:
        return Finding("Stripe", "ok", "not set up: usage is metered and shown, nothing is paid")
    base = settings.stripe_api_base or STRIPE
    try:
        answer = httpx.get(f"{base}/v1/balance", auth=(settings.stripe_api_key, ""), timeout=15)
    except httpx.HTTPError as error:
        fix = "let the box reach it; serving goes on, payments wait"
        return Finding("Stripe", "note", f"{base} does not answer: {error}", fix)
    if answer.status_code == 401:
        return Finding("Stripe", "fail", "refuses the key", "correct TAPEOUT_STRIPE_API_KEY")
    if not settings.stripe_webhook_secrets:
        return Finding(
            *("Stripe", "note", "no webhook secret: what is paid is found late, by asking"),
            f"add {settings.url}/webhooks/stripe at Stripe, and TAPEOUT_STRIPE_WEBHOOK_SECRET",
        )
    return Finding("Stripe", "ok", f"answers at {base} ({clock.now():%Y-%m-%d})")
