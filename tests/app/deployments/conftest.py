"""Scripted processes behind the real launcher, and links to workers that need no process."""

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.database import Database
from app.core.storage import Storage
from app.deployments.launchers.base import Launch
from app.deployments.launchers.local import LocalLauncher
from app.settings import Settings
from tests.app.deployments.box import Box

FAKE = str(Path(__file__).with_name("fake_process.py"))


class Script(dict[str, Any]):
    """What the next fake process will do. `for_role` overrides by role."""

    def command(self, launch: Launch, socket_path: str) -> list[str]:
        script = {**self, **self.get(launch.role, {})}
        script = {key: value for key, value in script.items() if key not in ("worker", "build")}
        return [sys.executable, "-P", FAKE, launch.role, socket_path, json.dumps(script)]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "data")


@pytest.fixture
async def launcher(storage: Storage, script: Script) -> AsyncIterator[LocalLauncher]:
    launcher = LocalLauncher(storage, command=script.command)
    yield launcher
    await launcher.close()


@pytest.fixture
def launch(storage: Storage) -> Launch:
    return Launch(role="worker", log_path=storage.log("test"), num_threads=1)


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not [t for t in threading.enumerate() if t not in before and not t.daemon]


async def until_async(condition: Callable[[], Awaitable[object]], seconds: float = 20.0) -> None:
    """As `until`, for conditions that look into the database."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits for something that happens in its own time; the bound only ends a broken test."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.01)


@pytest.fixture
async def box(
    database: Database, storage: Storage, settings: Settings, launcher: LocalLauncher
) -> AsyncIterator[Box]:
    box = Box(database, storage, settings, launcher)
    yield box
    await box.optimiser.close()
    await box.builder.close()
    await box.fleet.close(1)
