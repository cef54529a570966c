"""The one form of container that is ever started.

Pure: an order becomes the body of Docker's `POST /containers/create` (Engine API 1.41). Nothing of
an order reaches it but a name, a role, numbers and paths that `orders.check_start` has seen.
"""

import sys
from typing import Any

import msgspec

from app.deployments.launchers.orders import RUN, Start

LABEL = "com.tapeout.box"
PIDS = {"worker": 512, "build": 4096}  # a build runs compilers
OOM_SCORES = {"worker": 500, "build": 1000}  # when memory runs out they go before the app
SHARED_MEMORY_BYTES = 1024**3
TEMPORARY_BYTES = 256 * 1024**2
OUTPUT_BYTES = "10m"


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher knows of the box: the image that it runs from itself, and where the data
    directory, as its own container sees it, lies on the host."""

    image: str
    data_dir: str
    host_data_dir: str
    box: str

    def on_host(self, path: str) -> str:
        assert path.startswith(f"{self.data_dir}/"), "checked with the order"
        return self.host_data_dir + path.removeprefix(self.data_dir)


def run_dir(order: Start, surroundings: Surroundings) -> str:
    """The socket's directory, the container's home."""
    return f"{surroundings.data_dir}/{RUN}/{order.name}"


def container_name(name: str, surroundings: Surroundings) -> str:
    return f"tapeout-{surroundings.box}-{name}"


def container_body(
    order: Start, environment: dict[str, str], surroundings: Surroundings
) -> dict[str, Any]:
    """No network, nothing writable but its own directories, no capabilities, no new privileges."""
    own_dir = run_dir(order, surroundings)
    return {
        "Image": surroundings.image,
        "Entrypoint": [
            *(sys.executable, "-P", "-m", f"runtime.{order.role}"),
            *("--socket", f"{own_dir}/s"),
        ],
        "Cmd": [],
        "Env": [f"{name}={value}" for name, value in sorted(environment.items())],
        "WorkingDir": f"{own_dir}/home",
        "Labels": {LABEL: surroundings.box, f"{LABEL}.name": order.name},
        "NetworkDisabled": True,
        "Healthcheck": {"Test": ["NONE"]},  # the image's asks the app
        "HostConfig": {
            "NetworkMode": "none",
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges:true"],
            "PidsLimit": PIDS[order.role],
            "Memory": order.memory_bytes,
            "MemorySwap": order.memory_bytes,  # the same: no swap beside it
            "NanoCpus": 0,
            "CpuShares": 1024 if order.role == "worker" else 256,
            "OomScoreAdj": OOM_SCORES[order.role],
            "IpcMode": "private",
            "ShmSize": SHARED_MEMORY_BYTES,
            "Init": True,
            "Privileged": False,
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {
                "Type": "json-file",
                "Config": {"max-size": OUTPUT_BYTES, "max-file": "1"},
            },
            "Tmpfs": {"/tmp": f"rw,noexec,nosuid,nodev,size={TEMPORARY_BYTES}"},  # noqa: S108
            "Mounts": [
                _bind(own_dir, surroundings, is_read_only=False),
                *(_bind(path, surroundings, is_read_only=True) for path in order.readable),
                *(_bind(path, surroundings, is_read_only=False) for path in order.writable),
            ],
            "DeviceRequests": _devices(order.device),
        },
    }


def _bind(path: str, surroundings: Surroundings, *, is_read_only: bool) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": surroundings.on_host(path),
        "Target": path,
        "ReadOnly": is_read_only,
        # Volumes lie below the root of the engine, which takes nothing more private.
        "BindOptions": {"Propagation": "rslave"},
    }


def _devices(device: str) -> list[dict[str, Any]]:
    """One GPU, by number; the first where none is named."""
    if not device.startswith("cuda"):
        return []
    number = device.partition(":")[2] or "0"
    return [{"Driver": "nvidia", "DeviceIDs": [number], "Capabilities": [["gpu"]]}]
