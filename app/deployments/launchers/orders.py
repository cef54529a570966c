"""What the app and the launcher's process say to each other: one order per connection, as a line of
JSON, and its replies. A start's connection stays open for as long as its container runs.
"""

import re
from pathlib import Path
from typing import Literal

import msgspec

MAX_LINE_BYTES = 1024 * 1024
NAME = re.compile(r"[0-9a-f]{8}")
DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,2})?")
# What a container may be given, below the data directory. Nothing else of it can be asked for.
READABLE = re.compile(r"(uploads|artifacts)/[A-Za-z0-9_]{1,64}")
WRITABLE = re.compile(r"builds/[A-Za-z0-9_]{1,64}/out")
RUN = "run"


class OrderError(Exception):
    """An order that is not carried out. The message says why, in plain words."""


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start", forbid_unknown_fields=True):
    """Start one worker or build. Paths are as the app sees them, absolute, below `data_dir`."""

    name: str
    role: Literal["worker", "build"]
    num_threads: int
    device: str
    memory_bytes: int
    readable: list[str]
    writable: list[str]


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop", forbid_unknown_fields=True):
    """Ask a container to end, and end it after `grace_seconds`."""

    name: str
    grace_seconds: int


class Status(msgspec.Struct, frozen=True, tag="status", forbid_unknown_fields=True):
    """Which containers run."""


class Started(msgspec.Struct, frozen=True, tag="started"):
    name: str


class Output(msgspec.Struct, frozen=True, tag="output"):
    """What the process printed."""

    data: bytes


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """How it ended; `code` is 128 and the signal's number for one that a signal ended."""

    code: int
    is_over_memory: bool


class Running(msgspec.Struct, frozen=True, tag="running"):
    names: list[str]
    problem: str = ""  # why nothing can be started now, if so


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    message: str


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A stop was carried out."""


Order = Start | Stop | Status
Reply = Started | Output | Ended | Running | Refused | Done


def encode(message: Order | Reply) -> bytes:
    return msgspec.json.encode(message) + b"\n"


decode_order = msgspec.json.Decoder(Order).decode
decode_reply = msgspec.json.Decoder(Reply).decode


def check_start(order: Start, data_dir: Path) -> None:
    """Raises `OrderError` for anything but one worker or build with its own few paths: the process
    that orders is reachable from the network, the one that carries it out is not."""
    _require(NAME.fullmatch(order.name) is not None, "a name is eight hexadecimal digits")
    _require(0 < order.num_threads <= 1024, "threads are 1 to 1024")
    _require(DEVICE.fullmatch(order.device) is not None, "a device is cpu or cuda, with a number")
    _require(0 <= order.memory_bytes < 2**50, "the memory limit is out of range")
    _require(len(order.readable) == 1, "there is one thing to read")
    _require(len(order.writable) <= 1, "there is at most one thing to write")
    _require(order.role == "build" or not order.writable, "a worker writes nothing")
    for text in order.readable:
        _check_path(text, data_dir, READABLE)
    for text in order.writable:
        _check_path(text, data_dir, WRITABLE)


def check_name(name: str) -> None:
    _require(NAME.fullmatch(name) is not None, "a name is eight hexadecimal digits")


def _check_path(text: str, data_dir: Path, allowed: re.Pattern[str]) -> None:
    """One thing of its kind, without links on the way."""
    below = text.removeprefix(f"{data_dir}/")
    is_known = below != text and allowed.fullmatch(below) is not None
    _require(is_known, f"{text!r} is not the app's to hand out")
    _require(Path(text).resolve() == Path(text), f"{text!r} leads elsewhere")


def _require(is_right: bool, message: str) -> None:
    if not is_right:
        raise OrderError(f"the launcher refuses this: {message}")
