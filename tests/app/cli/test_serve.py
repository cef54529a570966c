"""`tapeout serve` as a process of its own: what stops its start is one plain sentence."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from app.billing.ledger import open_account
from app.core.claim import DatabaseClaim
from app.core.database import Database
from app.core.lock import hold_data_dir
from app.settings import Settings

TAPEOUT = Path(sys.executable).with_name("tapeout")


def serve(data_dir: Path, database_url: str) -> subprocess.CompletedProcess[str]:
    """Only for starts that fail."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {
        "TAPEOUT_DATA_DIR": str(data_dir),
        "TAPEOUT_OPTIMISE": "0",
        "TAPEOUT_DATABASE_URL": database_url,
        "TAPEOUT_PORT": str(port),
    }
    return subprocess.run(
        [TAPEOUT, "serve"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("tapeout: ")
    for word in words:
        assert word in line


def test_a_second_box_on_one_database_is_refused(settings: Settings, tmp_path: Path) -> None:
    claim = DatabaseClaim(settings.sync_database_url)
    claim.take()
    done = serve(tmp_path / "another", settings.database_url)
    claim.release()
    assert_refused(done, "in use", f"process {os.getpid()}", "TAPEOUT_DATABASE_URL")


def test_a_second_box_on_one_data_directory_is_refused(tmp_path: Path) -> None:
    with hold_data_dir(tmp_path):
        done = serve(tmp_path, f"sqlite:///{tmp_path}/tapeout.db")
    assert_refused(done, "in use", f"process {os.getpid()}", "--data-dir")


@pytest.mark.parametrize(
    "url", ["sqlite:////no/such/place/a.db", "postgresql://nobody@127.0.0.1:1/none"]
)
def test_a_database_that_is_not_there_is_named(tmp_path: Path, url: str) -> None:
    assert_refused(serve(tmp_path, url), "The database", "TAPEOUT_DATABASE_URL")


async def test_a_box_keeps_its_currency(settings: Settings, database: Database) -> None:
    async with database.write() as session:
        await open_account(session, "org_1", "eur")
    done = await asyncio.to_thread(serve, settings.data_dir, settings.database_url)
    assert_refused(done, "TAPEOUT_CURRENCY is usd", "Set it to eur again")
