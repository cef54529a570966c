"""Starts and stops the demo's own appliance: `tapeout serve` on SQLite in `.demo/data`.

Owns its process id, key and log file. What the demo then does with it is in `tour.py`.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import msgspec

DIRECTORY = Path(__file__).resolve().parents[1] / ".demo"
STATE = DIRECTORY / "appliance.json"
LOG = DIRECTORY / "appliance.log"
START_SECONDS = 60
MIN_FREE_BYTES = 1024**3


class DemoError(Exception):
    """What went wrong, in one plain sentence."""


class Appliance(msgspec.Struct):
    """A running appliance: its process, where it answers and its admin key."""

    pid: int
    url: str
    key: str
    setup_link: str = ""


def check_machine() -> None:
    """Ends what an earlier demo left. Raises `DemoError` for what would stop this one half way."""
    DIRECTORY.mkdir(exist_ok=True)
    if shutil.disk_usage(DIRECTORY).free < MIN_FREE_BYTES:
        raise DemoError(f"less than 1 GB is free in {DIRECTORY}; make room first.")
    stop(is_quiet=True)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port())) == 0:
            raise DemoError(
                f"port {port()} is in use; stop what uses it, or run: "
                f"TAPEOUT_PORT={port() + 1} make demo"
            )
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++")):
        print("No C++ compiler was found: decoders run on the slower reference attention.")


def port() -> int:
    return int(os.environ.get("TAPEOUT_PORT", "8080"))


def start() -> Appliance:
    """An appliance on the data of earlier runs. Raises `DemoError` when it does not start."""
    key_path = DIRECTORY / "admin-key"
    if not key_path.exists():
        key_path.touch(mode=0o600)
        key_path.write_text("tp-" + secrets.token_urlsafe(32))
    key = key_path.read_text()
    environment = {n: v for n, v in os.environ.items() if not n.startswith("TAPEOUT_")}
    environment |= {"TAPEOUT_ADMIN_KEY": key, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [Path(sys.executable).with_name("tapeout"), "serve"]
    options = ["--data-dir", DIRECTORY / "data", "--port", str(port())]
    with LOG.open("wb") as log:
        process = subprocess.Popen(
            [*command, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    appliance = Appliance(pid=process.pid, url=f"http://127.0.0.1:{port()}", key=key)
    STATE.touch(mode=0o600)
    STATE.write_bytes(msgspec.json.encode(appliance))
    wait_until_ready(appliance, process)
    if link := re.search(r"http\S+/setup\S+", LOG.read_text()):
        appliance.setup_link = link[0]
    return appliance


def wait_until_ready(appliance: Appliance, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = LOG.read_text().strip().splitlines() or ["it said nothing"]
            raise DemoError(f"the appliance did not start: {lines[-1]}")
        try:
            if httpx.get(f"{appliance.url}/readyz", timeout=2).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise DemoError(f"the appliance did not answer within {START_SECONDS} s; see {LOG}")


def stop(is_quiet: bool = False) -> None:
    """Ends the appliance that an earlier demo left running, if there is one."""
    if not STATE.exists():
        if not is_quiet:
            print("No demo is running.")
        return
    appliance = msgspec.json.decode(STATE.read_bytes(), type=Appliance)
    if is_ours(appliance.pid):
        os.kill(appliance.pid, signal.SIGTERM)
        deadline = time.monotonic() + 40
        while is_ours(appliance.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        if is_ours(appliance.pid):
            os.killpg(appliance.pid, signal.SIGKILL)
    STATE.unlink()
    if not is_quiet:
        print("The demo's appliance has stopped; its data stays in .demo/.")


def is_ours(pid: int) -> bool:
    """Whether a process of that id is our `tapeout serve`, not one that got the number later."""
    with contextlib.suppress(ChildProcessError):  # started by an earlier run
        os.waitpid(pid, os.WNOHANG)
    return "tapeout serve" in command_line(pid)


def command_line(pid: int) -> str:
    """How the process was started; empty if there is none, or only its remains."""
    if Path("/proc/self").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except FileNotFoundError:
            return ""
    found = subprocess.run(
        ["ps", "-o", "args=", "-p", str(pid)],  # noqa: S607 - present wherever /proc is not
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout
