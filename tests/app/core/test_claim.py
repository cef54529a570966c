"""One app per database: refused while another has it, free as soon as that one has ended."""

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from app.core.claim import DatabaseClaim, DatabaseInUse
from app.core.errors import Unavailable
from app.settings import Settings

CLAIM = """
import sys; from app.core.claim import DatabaseClaim
claim = DatabaseClaim(sys.argv[1]); claim.take()
print("held", flush=True); sys.stdin.read()
"""


def test_one_process_per_database(settings: Settings) -> None:
    url = settings.sync_database_url
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    claim = DatabaseClaim(url)
    with pytest.raises(DatabaseInUse, match=rf"process {other.pid}.*TAPEOUT_DATABASE_URL"):
        claim.take()
    assert not claim.is_held
    other.kill()  # however it ends, its claim ends with it
    other.communicate()
    for _ in range(2):
        take_once_free(claim)
        assert claim.is_held
        claim.release()


def take_once_free(claim: DatabaseClaim) -> None:
    """PostgreSQL needs a moment to see that a session's process is gone."""
    for _ in range(1000):
        try:
            return claim.take()
        except DatabaseInUse:
            continue
    raise AssertionError("the claim outlived its process")


def test_a_link_to_the_file_is_the_same_database(settings: Settings, tmp_path: Path) -> None:
    if not settings.is_sqlite:
        pytest.skip("of SQLite's files")
    claim = DatabaseClaim(settings.sync_database_url)
    claim.take()
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    url = f"sqlite:///{tmp_path}/elsewhere/./tapeout.db"
    with pytest.raises(DatabaseInUse):
        DatabaseClaim(url).take()
    claim.release()


def test_a_claim_lost_with_its_connection_is_taken_again_or_seen_to_be_gone(
    settings: Settings,
) -> None:
    if settings.is_sqlite:
        pytest.skip("SQLite has no connections to lose")
    claim, other = (DatabaseClaim(settings.sync_database_url) for _ in range(2))
    claim.take()
    claim.renew()
    end_sessions(settings)
    claim.renew()
    assert claim.is_held
    with pytest.raises(DatabaseInUse):
        other.take()

    end_sessions(settings)
    other.take()
    for _ in range(2):
        with pytest.raises(DatabaseInUse):
            claim.renew()
        assert not claim.is_held
    other.release()
    claim.renew()
    assert claim.is_held
    claim.release()
    claim.renew()
    assert not claim.is_held


def end_sessions(settings: Settings) -> None:
    engine = create_engine(settings.sync_database_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    engine.dispose()


@pytest.mark.parametrize(
    "url", ["sqlite:////no/such/place/a.db", "postgresql+psycopg://nobody@127.0.0.1:1/none"]
)
def test_a_database_that_is_not_there_is_said_in_one_sentence(url: str) -> None:
    with pytest.raises(Unavailable, match="TAPEOUT_DATABASE_URL") as caught:
        DatabaseClaim(url).take()
    assert "\n" not in caught.value.message


def test_a_database_in_memory_is_nobody_elses() -> None:
    claims = [DatabaseClaim("sqlite:///:memory:") for _ in range(2)]
    for claim in claims:
        claim.take()
    assert all(claim.is_held for claim in claims)
