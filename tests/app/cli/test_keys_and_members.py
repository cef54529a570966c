"""`tapeout keys` and `tapeout members`, against the whole application in this process."""

from collections.abc import Callable, Iterator

import httpx
import msgspec
import pytest
from click.testing import CliRunner, Result
from litestar.testing import TestClient

from app.cli import main
from app.cli.client import Box
from app.main import create_app
from app.settings import Settings
from tests.app.conftest import ADMIN_KEY

Run = Callable[..., Result]


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    settings = msgspec.structs.replace(settings, admin_key=ADMIN_KEY)
    with TestClient(create_app(settings)) as http:
        http.headers["Authorization"] = f"Bearer {ADMIN_KEY}"

        def connect(box: Box) -> None:
            box.url, box._http = settings.url, http  # type: ignore[assignment]

        monkeypatch.setattr(Box, "__init__", connect)
        yield lambda *arguments: CliRunner().invoke(main, arguments)


def test_a_key_with_a_limit_and_an_end(run: Run) -> None:
    made = run("keys", "create", "ci", "--scope", "read", "--days", "3", "--limit", "5")
    assert made.exit_code == 0, made.output
    assert made.stdout.startswith("tp-")
    (line,) = [line for line in run("keys").stdout.splitlines() if "  ci " in line]
    id = line.split()[0]
    assert "$5.00 a month" in line
    assert line.endswith("UTC")
    assert run("keys", "limit", id, "2.50", "--per", "day").exit_code == 0
    assert run("keys", "limit", id, "none").exit_code == 0
    (line,) = [line for line in run("keys").stdout.splitlines() if "  ci " in line]
    assert "  $2.50 a day  " in line
    assert run("keys", "revoke", id).exit_code == 0
    (line,) = [line for line in run("keys").stdout.splitlines() if "  ci " in line]
    assert line.endswith("revoked")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("keys", "create", "ci", "--limit", "much"), "a limit is an amount such as 12.50"),
        (("keys", "limit", "key_x", "5"), "You have no key 'key_x'."),
        (("keys", "limit", "key_x", "none"), "there is no API key 'key_x'"),
        (("members", "remove", "x@example.com"), "x@example.com is no member"),
        (("members", "revoke", "invite_x"), "There is no such invitation"),
        (("members", "invite", "--hours", "0"), "A link lasts 1 to 720 hours."),
    ],
)
def test_what_cannot_be_done_is_said(run: Run, arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert said in done.output


def test_people_come_and_go(run: Run) -> None:
    made = run("members", "invite", "--role", "owner", "--for", "Ada")
    assert made.exit_code == 0, made.output
    assert "/console/invitation/" in made.stdout
    (line,) = [line for line in run("members", "invitations").stdout.splitlines() if "Ada" in line]
    assert "TAPEOUT_ADMIN_KEY" in line
    join(made.stdout.strip(), "ada@example.com")
    join(run("members", "invite").stdout.strip(), "bob@example.com")
    assert run("members", "role", "bob@example.com", "viewer").exit_code == 0
    (line,) = [line for line in run("members").stdout.splitlines() if "bob" in line]
    assert "  viewer  " in line
    refused = run("members", "remove", "ada@example.com")
    assert "Only an owner, signed in to the console" in refused.output
    assert run("members", "remove", "bob@example.com").exit_code == 0
    assert "bob" not in run("members").stdout
    id = run("members", "invitations").stdout
    assert len(id.splitlines()) == 1  # both were used


def join(url: str, email: str) -> None:
    """As somebody does who was sent the link."""
    http = Box()._http
    assert isinstance(http, httpx.Client)
    path = httpx.URL(url).path
    page = http.get(path)
    token = page.text.split('name="csrf_token" value="')[1].split('"')[0]
    form = {"csrf_token": token, "email": email, "password": "four random words here"}
    origin = {"Origin": "http://testserver.local"}
    done = http.post(path, data=form, headers=origin, follow_redirects=False)
    assert done.status_code == 303, done.text
    http.cookies.clear()
