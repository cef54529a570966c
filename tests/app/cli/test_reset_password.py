"""`tapeout reset-password`, beside a box that serves."""

import asyncio
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from app.cli import main
from app.core.database import Database
from app.core.errors import Unauthenticated
from app.organizations.service import bootstrap, redeem_setup
from app.organizations.signins import SignedIn, SignIns
from app.settings import Settings

EMAIL, OLD, NEW = "ada@example.com", "correct horse battery", "four random words here"


@pytest.fixture
async def ada(
    database: Database, settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> SignedIn:
    monkeypatch.setenv("TAPEOUT_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("TAPEOUT_DATABASE_URL", database_url)
    token = await bootstrap(database, settings)
    assert token is not None
    async with database.write() as session:
        await redeem_setup(session, token, EMAIL, OLD)
    return await SignIns(database, session_days=14).sign_in(EMAIL, OLD, "10.0.0.1")


def _run(*arguments: str, typed: str = f"{NEW}\n{NEW}\n") -> Result:
    return CliRunner().invoke(main, ["reset-password", *arguments], input=typed)


async def _in_thread(*arguments: str, typed: str = f"{NEW}\n{NEW}\n") -> Result:
    """The command has an event loop of its own."""
    return await asyncio.to_thread(_run, *arguments, typed=typed)


async def test_the_new_password_alone_lets_in(ada: SignedIn, database: Database) -> None:
    done = await _in_thread(" ADA@example.com")
    assert done.exit_code == 0, done.output
    assert NEW not in done.output
    sign_ins = SignIns(database, session_days=14)
    with pytest.raises(Unauthenticated):
        await sign_ins.authenticate(ada.token)
    with pytest.raises(Unauthenticated):
        await sign_ins.sign_in(EMAIL, OLD, "10.0.0.2")
    again = await sign_ins.sign_in(EMAIL, NEW, "10.0.0.3")
    assert again.principal.user_id == ada.principal.user_id


@pytest.mark.parametrize(
    ("email", "password", "said"),
    [
        ("bob@example.com", NEW, "Nobody signs in as bob@example.com."),
        ("ada", NEW, "Enter an e-mail address"),
        (EMAIL, "short", "at least 10 characters"),
    ],
)
async def test_what_cannot_be_done_is_said_and_changes_nothing(
    ada: SignedIn, database: Database, email: str, password: str, said: str
) -> None:
    refused = await _in_thread(email, typed=f"{password}\n{password}\n")
    assert refused.exit_code == 1
    assert said in refused.output
    assert await SignIns(database, session_days=14).authenticate(ada.token) == ada


def test_a_directory_without_a_box_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TAPEOUT_DATABASE_URL", raising=False)
    refused = _run(EMAIL, "--data-dir", str(tmp_path))
    assert refused.exit_code == 1
    assert "There is no box in" in refused.output
    assert not list(tmp_path.iterdir())
