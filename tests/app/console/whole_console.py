"""The whole application over HTTP in this process, with one of everything in it, and a real
browser beside: for tests that look at every page of the console."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import uvicorn
from litestar import Litestar
from litestar.routes import HTTPRoute
from playwright.async_api import BrowserContext, async_playwright

from app.console.guide import library
from app.settings import Settings
from tests.app.api.conftest import FakeTarget
from tests.app.console.conftest import CHROMIUM, CHROMIUM_ARGUMENTS
from tests.app.console.samples import DECODER, EMBEDDER, OPTIMISED, TENSOR, add_model
from tests.app.tenancy_objects import add_objects
from tests.app.tenancy_rules import NEUTRAL
from tests.app.whole_app import Tenant, add_tenant, running

# Streams, files and one-time links.
NO_PAGES = re.compile(
    r"(/events|/log|\.csv|/file|/proof|/state|\{token\}|\{file_path\}|/guide/\{name\})$|/runs/"
)
MORE = (
    "/models/quibble-model/docs",
    "/console/models/decoder",
    "/console/models/decoder/playground",
    "/console/models/embedder",
    "/console/models/embedder/playground",
    "/console/models/failed",
    "/console/models/building",
    "/console/models?q=nothing-like-it",
    "/console/usage?split=model",
    "/console/nothing",
    "/console/requests?model=none",
)
BEFORE_SESSION = ("/console/sign-in", "/console/setup/none", "/console/invitation/none", "/guide")


class WholeConsole(msgspec.Struct):
    """`addresses` are all pages that its owner, who operates the box, can open."""

    url: str
    owner: Tenant
    addresses: list[str]


@asynccontextmanager
async def whole_console(settings: Settings) -> AsyncIterator[WholeConsole]:
    """Served by uvicorn on a free port, without the clerk."""
    async with running(settings, has_clerk=False) as application:
        owner = await add_tenant(application, "quibble limited", is_operator=True)
        values = msgspec.structs.asdict(await add_objects(application, owner))
        values |= {name: text for name, text in NEUTRAL.items() if name not in values}
        values["book_id"] = application.state.prices.active.id
        await _add_more(application, owner)
        _pretend_to_serve(application)
        paths = [path.format_map(values) for path in _pages_of(application)]
        paths += [f"/guide/{name}" for name in library()]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        config = uvicorn.Config(
            application, port=port, lifespan="off", log_config=None, access_log=False
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        try:
            yield WholeConsole(f"http://127.0.0.1:{port}", owner, [*paths, *MORE])
        finally:
            application.state.broadcast.close()
            server.should_exit = True
            await serving


async def _add_more(application: Litestar, owner: Tenant) -> None:
    """Models of the other kinds and states."""
    async with application.state.database.write() as session:
        for name, manifest in (("decoder", DECODER), ("embedder", EMBEDDER)):
            await add_model(session, name, owner=owner.name, manifest=manifest, receipt=OPTIMISED)
        await add_model(
            session, "failed", "failed", owner=owner.name,
            error_code="needs_inputs", error_message="Say what it takes:\n    --input x=1x3",
        )  # fmt: skip
        await add_model(
            session, "building", "building", owner=owner.name, phase="prove", progress_permille=610
        )


def _pretend_to_serve(application: Litestar) -> None:
    """For playgrounds, which have a page for what runs alone."""
    manifests = {"decoder": DECODER, "embedder": EMBEDDER}

    def resolve(_: Any, name: str) -> FakeTarget:
        return FakeTarget(name, manifests.get(name, TENSOR), None)

    application.state.fleet.resolve = resolve


def _pages_of(application: Litestar) -> list[str]:
    return sorted(
        route.path_format
        for route in application.routes
        if isinstance(route, HTTPRoute)
        and "GET" in route.methods
        and (route.path_format.startswith(("/console/", "/guide")) or route.path_format == "/docs")
        and not NO_PAGES.search(route.path_format)
    )


@asynccontextmanager
async def browser_at(console: WholeConsole, **options: Any) -> AsyncIterator[BrowserContext]:
    """Signed in as the owner unless `cookies=False`."""
    has_session = options.pop("cookies", True)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=CHROMIUM_ARGUMENTS
        )
        context = await browser.new_context(base_url=console.url, **options)
        if has_session:
            await context.add_cookies(
                [
                    {"name": name, "value": value, "url": console.url}
                    for name, value in console.owner.cookies.items()
                ]
            )
        yield context
        await browser.close()
