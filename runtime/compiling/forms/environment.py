"""Names what a compiled form depends on beyond its files: versions, processor, threads.

A form made in one environment is not used in another; equality of the string is the whole test.
"""

import hashlib
from importlib import metadata
from typing import Any

import torch

from runtime.compiling.forms.processor import processor

LAYOUT = 1  # of the files that families write; raise it when older ones can no longer be loaded
_PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "triton")


def environment(device: str, num_threads: int) -> str:
    """One line, as `torch 2.13.0+cpu, onnxruntime 1.31.1, AMD EPYC (flags 1f0c9a62), 2 threads,
    layout 1`."""
    machine = _gpu(device) if device.startswith("cuda") else _cpu()
    return ", ".join([*_versions(), machine, f"{num_threads} threads", f"layout {LAYOUT}"])


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def _gpu(device: str) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    internals: Any = torch._C
    driver = internals._cuda_getDriverVersion()
    name = torch.cuda.get_device_name(device)
    return f"{name} (capability {major}.{minor}, driver {driver}, CUDA {torch.version.cuda})"


def _cpu() -> str:
    """Model and a digest of its instruction sets: compiled code uses all that it was made on."""
    name, flags = processor()
    digest = hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()[:8]
    return f"{name} (flags {digest})"
