"""Two ways to test the console: its routes over real services, without processes (`console`), and
a whole box driven by a real browser (`box`, `browser`)."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
from litestar import Litestar
from litestar.datastructures import State
from litestar.testing import AsyncTestClient
from playwright.sync_api import Browser, Page, sync_playwright

from app import console as console_pages
from app.api.arriving import ArrivingBodies
from app.billing.records import Records
from app.billing.signing import open_key
from app.billing.usage_archive import UsageArchive
from app.core.broadcast import Broadcast
from app.core.database import Database
from app.core.storage import Storage
from app.organizations.service import bootstrap
from app.organizations.signins import SignIns
from app.registry.uploads import UploadStore
from app.settings import Settings

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ORIGIN = "http://testserver.local"
EMAIL, PASSWORD = "ada@example.com", "four random words here"


class FakeOptimiser:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    async def ask(self, version_id: str) -> None:
        self.told.append(("ask", version_id))

    async def cancel(self, version_id: str) -> None:
        self.told.append(("cancel", version_id))


class FakeBuilder:
    """Stands in for the builder, which would start processes."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    async def cancel(self, version_id: str) -> None:
        self.cancelled.append(version_id)


class Console(msgspec.Struct):
    """The console's routes, and what stands behind them."""

    client: AsyncTestClient[Litestar]
    database: Database
    storage: Storage
    builder: FakeBuilder
    optimiser: FakeOptimiser
    setup_token: str

    async def csrf_token(self, path: str) -> str:
        """The token in the forms of a page."""
        page = await self.client.get(path)
        assert page.status_code == 200, page.text
        found = re.search(r'name="csrf_token" value="([^"]+)"', page.text)
        assert found, "the page has no form"
        return found[1]

    async def post(self, page: str, path: str, **fields: str | list[str]) -> "Answer":
        """Sends a form as the browser does that shows `page`."""
        data = {"csrf_token": await self.csrf_token(page), **fields}
        answer = await self.client.post(path, data=data, headers={"Origin": ORIGIN})
        return Answer(answer.status_code, answer.text, answer.headers.get("location", ""))

    async def set_up(self) -> None:
        """Makes the owner's account and signs in as the owner."""
        path = f"/console/setup/{self.setup_token}"
        done = await self.post(path, path, email=EMAIL, password=PASSWORD)
        assert (done.status, done.location) == (303, "/console/overview"), done.text


class Answer(msgspec.Struct):
    status: int
    text: str
    location: str


@pytest.fixture
async def console(database: Database, settings: Settings) -> AsyncIterator[Console]:
    """A console that nobody has set up yet."""
    setup_token = await bootstrap(database, settings)
    assert setup_token is not None
    storage = Storage(settings.data_dir)
    builder = FakeBuilder()
    optimiser = FakeOptimiser()
    archive = UsageArchive(storage.usage_archive)
    key = open_key(storage.receipt_key)
    records = Records(settings.sync_database_url, archive, key.public_hex)
    state = State(
        {
            "settings": settings,
            "records": records,
            "database": database,
            "storage": storage,
            "broadcast": Broadcast(),
            "arriving": ArrivingBodies(settings.max_request_bytes),
            "uploads": UploadStore(database, storage, settings),
            "builder": builder,
            "optimiser": optimiser,
            "sign_ins": SignIns(database, settings.session_days),
        }
    )
    application = Litestar([console_pages.router], state=state, openapi_config=None)
    async with AsyncTestClient(application) as client:
        client.follow_redirects = False
        yield Console(client, database, storage, builder, optimiser, setup_token)
    await records.close()


@pytest.fixture
async def owned(console: Console) -> Console:
    """A console whose owner is signed in."""
    await console.set_up()
    return console


# --- a whole box ------------------------------------------------------------------------


class Box(msgspec.Struct):
    """A running appliance."""

    url: str
    setup_url: str


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """The real thing on SQLite: `tapeout serve` with a data directory of its own."""
    with serving(tmp_path_factory.mktemp("box"), free_port()) as box:
        yield box


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(directory: Path, port: int, **settings: str) -> Iterator[Box]:
    """A box of its own, with more settings (`TAPEOUT_...`)."""
    with _process(directory, port, settings) as process:
        yield Box(f"http://127.0.0.1:{port}", _setup_url(process, directory / "log"))


@contextmanager
def restarted(directory: Path, port: int, **settings: str) -> Iterator[None]:
    """The box that `serving` had there before, again."""
    with _process(directory, port, settings):
        yield


@contextmanager
def _process(
    directory: Path, port: int, settings: dict[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TAPEOUT_")
    } | {
        "TAPEOUT_WORKER_THREADS": "1",
        "TAPEOUT_BUILD_THREADS": "1",
        "TAPEOUT_OPTIMISE": "0",
        "TAPEOUT_DRAIN_SECONDS": "2",
        "PYTHONUNBUFFERED": "1",
        **settings,
    }
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve"]
    command += ["--data-dir", str(directory / "data"), "--port", str(port)]
    with (directory / "log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


def _setup_url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"http://\S+/console/setup/\S+", log.read_text()):
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"the box did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Gone at the end of the module: while it is there, its event loop takes the thread, and no
    asynchronous test could run."""
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM} (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=CHROMIUM_ARGUMENTS
        )
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page in a browser that knows nothing yet. Whatever the browser complains of, such as a
    script or style that the content security policy forbids, fails the test; an answer that is an
    error does not."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    context.close()
    expected = ("Failed to load resource", "Response Status Error Code 4")  # answers, not faults
    assert [text for text in complaints if not text.startswith(expected)] == []


@pytest.fixture
def owner(box: Box, page: Page) -> Page:
    """The page of somebody who is signed in as the box's owner, who is made if need be."""
    with httpx.Client() as client:
        if client.get(box.setup_url).status_code == 200:
            page.goto(box.setup_url)
            page.get_by_label("E-mail").fill(EMAIL)
            page.get_by_label("Password").fill(PASSWORD)
            page.get_by_role("button", name="Create the owner").click()
            page.wait_for_url("**/console/overview")
            return page
    page.goto(f"{box.url}/console/sign-in")
    page.get_by_label("E-mail").fill(EMAIL)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/console/overview")
    return page
