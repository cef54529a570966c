"""The compose file on a real engine: built, up, pushed, called, billed; a worker and the app
killed; upgraded, down and up again with nothing lost. Run by `make test-docker`."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "tapeouttest"
KEY = "tp-docker-test-admin-key-01"
PORT = 18080
URL = f"http://127.0.0.1:{PORT}"
HEADERS = {"Authorization": f"Bearer {KEY}"}
READY_SECONDS = 180

pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        "TAPEOUT_DOCKER_WORK" not in os.environ, reason="`make test-docker` runs the compose file"
    ),
]


def run(*command: str, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


class Compose:
    """One project of compose.yaml, from a copy of what an image is built of."""

    def __init__(self, context: Path) -> None:
        self.context = context
        socket = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        self._environment = {
            "TAPEOUT_PORT": str(PORT),
            "TAPEOUT_IMAGE": "tapeout-test",
            "TAPEOUT_DOCKER_SOCKET": socket.removeprefix("unix://"),
            "COMPOSE_PROJECT_NAME": PROJECT,
            "DOCKER_BUILDKIT": "0",
        }
        has_program = shutil.which("docker-compose") is not None
        self._command = ["docker-compose"] if has_program else ["docker", "compose"]

    def __call__(self, *arguments: str) -> str:
        return run(*self._command, *arguments, cwd=self.context, environment=self._environment)

    def container(self, service: str) -> str:
        return self("ps", "-q", service).strip()


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    context = tmp_path_factory.mktemp("context")
    for name in ("Dockerfile", ".dockerignore", "compose.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, context)
    shutil.copy(ROOT / "requirements.lock", context)
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.so")
    for name in ("app", "runtime", "migrations", "templates", "docs"):
        shutil.copytree(ROOT / name, context / name, ignore=ignored)
    wheels = Path(os.environ.get("TAPEOUT_DOCKER_WORK", "")) / "wheels"
    if wheels.is_dir():
        shutil.copytree(wheels, context / "wheels", copy_function=os.link)
    (context / ".env").write_text(f"TAPEOUT_ADMIN_KEY={KEY}\nTAPEOUT_OPTIMISE=0\n")
    compose = Compose(context)
    run(
        *("docker", "build", "-q", "-t", "tapeout-test", "."),
        cwd=context,
        environment={"DOCKER_BUILDKIT": "0"},
    )
    compose("up", "-d", "--no-build")
    yield compose
    compose("down", "-v")


def wait_until_healthy() -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{URL}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise AssertionError("the box did not become ready")


def predict() -> httpx.Response:
    body = {"inputs": {"image": [[[[0] * 8] * 8]]}}
    return httpx.post(f"{URL}/models/digits/predict", json=body, headers=HEADERS, timeout=30)


def predict_until_answered() -> httpx.Response:
    deadline = time.monotonic() + READY_SECONDS
    response = None
    while time.monotonic() < deadline:
        try:
            response = predict()
            if response.status_code == 200:
                return response
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise AssertionError(f"no answer: {response and response.text}")


def usage() -> dict[str, int]:
    answer = httpx.get(f"{URL}/api/usage", headers=HEADERS, timeout=10).json()
    return {
        "requests": sum(row["requests"] for row in answer["rows"]),
        "total_nano": answer["total_nano"],
        "owed_nano": answer["owed_nano"],
        "held_nano": answer["held_nano"],
    }


def workers() -> list[str]:
    names = run("docker", "ps", "--format", "{{.Names}}", "--filter", "label=com.tapeout.box")
    return names.split()


def test_pushed_called_and_billed(compose: Compose, digits_file: Path) -> None:
    wait_until_healthy()
    tapeout = str(Path(sys.executable).with_name("tapeout"))
    environment = {"TAPEOUT_URL": URL, "TAPEOUT_API_KEY": KEY}
    printed = run(tapeout, "push", str(digits_file), "--name", "digits", environment=environment)
    assert printed.strip() == f"{URL}/models/digits"
    response = predict_until_answered()
    receipt = httpx.get(
        f"{URL}/v1/receipts/{response.headers['x-request-id']}", headers=HEADERS
    ).json()
    assert receipt["amount_nano"] > 0
    assert usage()["requests"] >= 1


def test_a_worker_can_touch_three_things_and_no_network(compose: Compose) -> None:
    [name] = workers()
    container = json.loads(run("docker", "inspect", name))[0]
    host = container["HostConfig"]
    assert (host["NetworkMode"], host["ReadonlyRootfs"], host["CapDrop"]) == ("none", True, ["ALL"])
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["PidsLimit"] > 0
    assert container["Config"]["User"] == "tapeout"
    mounts = {mount["Destination"].split("/")[2]: mount["RW"] for mount in container["Mounts"]}
    assert mounts == {"run": True, "artifacts": False}
    assert not any("ADMIN_KEY" in line or "DATABASE" in line for line in container["Config"]["Env"])


def test_only_the_launcher_sees_the_docker_socket(compose: Compose) -> None:
    for service, is_there in (("app", False), ("launcher", True), ("database", False)):
        mounts = json.loads(run("docker", "inspect", compose.container(service)))[0]["Mounts"]
        assert any("docker.sock" in mount["Destination"] for mount in mounts) == is_there


def test_a_killed_worker_comes_back(compose: Compose) -> None:
    [before] = workers()
    run("docker", "kill", before)
    predict_until_answered()
    [after] = workers()
    assert after != before


def test_a_killed_app_comes_back_with_its_books(compose: Compose) -> None:
    before = usage()
    process = run("docker", "inspect", "-f", "{{.State.Pid}}", compose.container("app")).strip()
    os.kill(int(process), 9)
    wait_until_healthy()
    assert usage() == before | {"held_nano": 0}
    predict_until_answered()
    assert len(workers()) == 1


def test_an_upgrade_keeps_everything(compose: Compose) -> None:
    before = usage()
    (compose.context / "app" / "NEWER").write_text("another layer")
    run(
        *("docker", "build", "-q", "-t", "tapeout-test", "."),
        cwd=compose.context,
        environment={"DOCKER_BUILDKIT": "0"},
    )
    compose("up", "-d", "--no-build")
    wait_until_healthy()
    assert usage() == before
    predict_until_answered()


def test_down_and_up_loses_nothing(compose: Compose) -> None:
    before = usage()
    compose("down")
    assert workers() == []
    compose("up", "-d", "--no-build")
    wait_until_healthy()
    assert usage() == before
    predict_until_answered()
