"""What the box computes on: its processor and memory, or its GPUs, as the machine tells.

Owns no placement: where models run is the setting `device`.
"""

import asyncio
import os
import shutil
import time
from pathlib import Path

import msgspec

ASK_SECONDS = 5.0  # nvidia-smi is not asked more often, nor waited for longer
GPU_QUERY = "--query-gpu=name,memory.total,memory.used"
MIB = 1024**2


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """`used_bytes` is of everything on the machine, not only of models."""

    name: str
    total_bytes: int
    used_bytes: int


class Devices:
    """Remembers what a GPU's driver said for a moment: asking it takes a tenth of a second."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._known: list[Device] = []
        self._asked_at: float | None = None
        self._asking = asyncio.Lock()

    async def read(self) -> list[Device]:
        """Those that models run on; empty where the machine does not tell."""
        if not self.device.startswith("cuda"):
            return _processor()
        async with self._asking:
            now = time.monotonic()
            if self._asked_at is None or now - self._asked_at > ASK_SECONDS:
                self._known, self._asked_at = await _ask_driver(), now
        return self._known


def _processor(proc: Path = Path("/proc")) -> list[Device]:
    """Linux's own account of the processor and its memory."""
    try:
        memory = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        total, available = (
            int(memory[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable")
        )
        model = next(
            (
                line.split(":", 1)[1].strip()
                for line in (proc / "cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            "CPU",
        )
    except (OSError, KeyError, ValueError):
        return []
    name = f"{model}, {os.cpu_count() or 1} cores"
    return [Device(name=name, total_bytes=total, used_bytes=total - available)]


async def _ask_driver() -> list[Device]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            GPU_QUERY,
            "--format=csv,noheader,nounits",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return []
    try:
        async with asyncio.timeout(ASK_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return []
    return read_gpus(output.decode(errors="replace"))


def read_gpus(text: str) -> list[Device]:
    """The driver's lines of name, memory and used memory in MiB."""
    devices: list[Device] = []
    for line in text.splitlines():
        name, *numbers = (part.strip() for part in line.rsplit(",", 2))
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
            total, used = (int(number) * MIB for number in numbers)
            devices.append(Device(name=name, total_bytes=total, used_bytes=used))
    return devices
