"""Boxes whose processes are killed and started again."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, create_engine, make_url

from app.core.database import create_writer_engine
from tests.app.conftest import database, database_url, settings, template_database
from tests.evidence.invariants import problems
from tests.evidence.lives import Life
from tests.evidence.seen import Totals, compare

__all__ = ["database", "database_url", "settings", "template_database"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long forms take minutes to hours, so they run where they are asked for alone."""
    if "soak" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("soak") is not None:
            item.add_marker(pytest.mark.skip(reason="a long form, for `make soak`"))


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.evidence.zygote"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.communicate(timeout=30)
    assert process.returncode == 0


class MortalBox:
    """Lives one after another, on one data directory and one database."""

    def __init__(self, zygote: subprocess.Popen[str], directory: Path, url: str) -> None:
        self._zygote = zygote
        self.directory = directory
        self.url = url
        self.engine: Engine = create_engine(make_url(url))

    def live(self, **options: Any) -> int:
        """The exit status of one life, see `Life`."""
        options = {"seed": 0, "seconds": 0.0, **options}
        life = Life(data_dir=str(self.directory), url=self.url, **options)
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(msgspec.json.encode(life).decode() + "\n")
        self._zygote.stdin.flush()
        return int(self._zygote.stdout.readline())

    def examine(self) -> Totals:
        """After a recovery: what was seen is on record, nothing is held, and all sums agree."""
        totals, differences = compare(self.directory / "seen.log", self.engine)
        with self.engine.begin() as connection:
            differences += problems(connection)
            held = connection.exec_driver_sql("SELECT * FROM hold").all()
        differences += [f"still held: {hold}" for hold in held]
        assert not differences, "\n".join(differences[:20])
        return totals


@pytest.fixture
def mortal_box(
    zygote: subprocess.Popen[str], database_url: str, tmp_path: Path
) -> Iterator[MortalBox]:
    directory = tmp_path / "box"
    directory.mkdir()
    box = MortalBox(zygote, directory, database_url)
    yield box
    box.engine.dispose()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Every transaction of it is for writing."""
    engine = create_writer_engine(database_url)
    yield engine
    engine.dispose()
