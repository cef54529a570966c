"""What the launcher's process carries out: one form of container, to which orders add nothing."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.deployments.launchers.orders import (
    OrderError,
    Start,
    Stop,
    check_name,
    check_start,
    decode_order,
    encode,
)
from app.deployments.launchers.template import Surroundings, container_body
from app.settings import FIELDS

SURROUNDINGS = Surroundings(
    image="sha256:1", data_dir="/data", host_data_dir="/var/volumes/data", box="box"
)


def order(data_dir: Path = Path("/data"), **changes: Any) -> Start:
    values: dict[str, Any] = {
        "name": "0123abcd",
        "role": "build",
        "num_threads": 2,
        "device": "cpu",
        "memory_bytes": 0,
        "readable": [f"{data_dir}/uploads/upl_1"],
        "writable": [f"{data_dir}/builds/version_1/out"],
    }
    return Start(**(values | changes))


def test_an_order_as_the_app_gives_it_is_carried_out() -> None:
    check_start(order(), Path("/data"))
    worker = order(role="worker", readable=["/data/artifacts/art_1"], writable=[])
    check_start(worker, Path("/data"))
    assert decode_order(encode(worker)) == worker
    assert decode_order(encode(Stop(name="0123abcd", grace_seconds=1))) == Stop(
        name="0123abcd", grace_seconds=1
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../etc"},
        {"name": "0123ABCD"},
        {"num_threads": 0},
        {"memory_bytes": -1},
        {"device": "cuda:0,1"},
        {"device": "all"},
        {"readable": []},
        {"readable": ["/data/uploads/a", "/data/uploads/b"]},
        {"readable": ["/"]},
        {"readable": ["/data"]},
        {"readable": ["/data/journal/1"]},
        {"readable": ["/data/keys/receipts.key"]},
        {"readable": ["/data/uploads/.."]},
        {"readable": ["/data/uploads/../keys"]},
        {"readable": ["/data/uploads/a/b"]},
        {"readable": ["/database/uploads/a"]},
        {"readable": ["uploads/a"]},
        {"readable": ["/data/uploads/a\0b"]},
        {"writable": ["/data/uploads/a"]},
        {"writable": ["/data/builds/a"]},
        {"writable": ["/data/builds/../out"]},
        {"role": "worker"},  # which writes nothing
    ],
)
def test_anything_else_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(OrderError):
        check_start(order(**changes), Path("/data"))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "uploads").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "uploads" / "upl_1").symlink_to(tmp_path / "secret")
    with pytest.raises(OrderError, match="leads elsewhere"):
        check_start(order(tmp_path, writable=[]), tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b'{"type":"exec","name":"0123abcd"}',
        b'{"type":"stop","name":"0123abcd","grace_seconds":1,"image":"evil"}',
        b'{"type":"start","name":"0123abcd"}',
    ],
)
def test_an_unknown_order_is_refused(line: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
        decode_order(line)


def test_a_name_must_be_a_name() -> None:
    with pytest.raises(OrderError):
        check_name("tapeout-box-1")


def test_the_container_has_no_way_out() -> None:
    body = container_body(order(memory_bytes=1024), {"B": "2", "A": "1"}, SURROUNDINGS)
    host = body["HostConfig"]
    assert (host["NetworkMode"], host["ReadonlyRootfs"], host["Privileged"]) == (
        "none",
        True,
        False,
    )
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges:true"])
    assert host["Memory"] == host["MemorySwap"] == 1024
    assert 0 < host["PidsLimit"] < 10_000
    assert body["Env"] == ["A=1", "B=2"]
    mounts = [(m["Source"], m["Target"], m["ReadOnly"]) for m in host["Mounts"]]
    assert mounts == [
        ("/var/volumes/data/run/0123abcd", "/data/run/0123abcd", False),
        ("/var/volumes/data/uploads/upl_1", "/data/uploads/upl_1", True),
        ("/var/volumes/data/builds/version_1/out", "/data/builds/version_1/out", False),
    ]
    assert host["DeviceRequests"] == []


@pytest.mark.parametrize(("device", "number"), [("cuda", "0"), ("cuda:3", "3")])
def test_one_device_is_asked_for(device: str, number: str) -> None:
    host = container_body(order(device=device), {}, SURROUNDINGS)["HostConfig"]
    assert host["DeviceRequests"] == [
        {"Driver": "nvidia", "DeviceIDs": [number], "Capabilities": [["gpu"]]}
    ]


def test_compose_passes_every_setting_that_it_does_not_fix() -> None:
    fixed = {"DATA_DIR", "HOST", "PORT", "LAUNCHER_SOCKET"}
    text = (Path(__file__).resolve().parents[3] / "compose.yaml").read_text()
    passed = set(re.findall(r"^      - TAPEOUT_([A-Z_]+)", text, re.MULTILINE))
    assert passed == FIELDS.keys() - fixed
