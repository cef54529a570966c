"""Names everything that decides which form of an upload is fastest on this box.

Equal keys share one result. The part that only a process with torch can tell is checked again when
a worker loads the result: its manifest carries the whole environment.
"""

import hashlib
import platform
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import msgspec

from app.registry.service import version_hints
from app.registry.tables import ModelVersion
from app.settings import Settings

PACKAGES = ("tapeout", "torch", "onnxruntime", "onnxruntime-gpu", "triton")
MACHINE_FIELDS = ("model name", "CPU part", "flags", "Features")


def cache_key(organization_id: str, version: ModelVersion, settings: Settings) -> str:
    """SHA-256 over whose it is (how long an optimisation takes must not tell one organization what
    another has uploaded), the upload, what its owner said of it, how it is served, and the box. The
    upload stands for the program: a build of one release makes the same of the same file."""
    hints = version_hints(version)
    parts = [
        organization_id,
        version.sha256,
        msgspec.to_builtins(hints.inputs),
        hints.accepts_loss,
        settings.device,
        settings.threads_per_worker,
        settings.build_memory_bytes,
        settings.optimise_timeout_seconds,
        machine(),
    ]
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


@lru_cache
def machine() -> list[str]:
    """Versions, processor and graphics driver, as far as they are seen without loading torch."""
    found = [platform.machine(), platform.python_version()]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    fields: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    found += [fields[name] for name in MACHINE_FIELDS if name in fields]
    driver = Path("/proc/driver/nvidia")
    return found + [
        _read(path) for path in [driver / "version", *driver.glob("gpus/*/information")]
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
