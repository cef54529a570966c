"""The console's router: pages behind a session, the few before it, static files, and the headers
that every answer carries."""

from typing import Any

from litestar import Response, Router, get
from litestar.datastructures import CacheControlHeader
from litestar.static_files import (
    create_static_files_router,  # pyright: ignore[reportUnknownVariableType]
)

from app.api.forms import MAX_FORM_BYTES, FormRequest
from app.console import (
    account,
    billing,
    books,
    box,
    budgets,
    decoder_playground,
    earnings,
    entry,
    guide,
    invoices,
    keys,
    members,
    models,
    new_organization,
    notices,
    optimisations,
    organizations,
    overview,
    playground,
    prices,
    rebuilding,
    top_ups,
    uploads,
    usage,
)
from app.console.errors import exception_handlers
from app.console.sessions import HOME
from app.console.templating import HEADERS, STATIC_DIR, STATIC_PATH, PageRequest
from app.core.errors import NotFound

YEAR_SECONDS = 365 * 86400
MAX_PATH_CHARS = 200  # of a static file


def secure(response: Response[Any]) -> Response[Any]:
    """Adds the headers of every page; what a route set itself stays."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


@get(["/", "/console"], include_in_schema=False)
async def home(request: PageRequest) -> Response[None]:
    """Where people start."""
    return Response(None, status_code=303, headers={"Location": HOME})


async def require_file_name(request: PageRequest) -> None:
    """Raises `NotFound` for what no file can be called: the disk would fail at it."""
    path = request.scope["path"]
    if len(path) > MAX_PATH_CHARS or not path.isprintable():
        raise NotFound("There is no such file.")


behind_session = Router(
    "/console",
    route_handlers=[
        overview.router,
        models.router,
        playground.router,
        decoder_playground.router,
        optimisations.router,
        uploads.router,
        rebuilding.router,
        keys.router,
        members.router,
        account.router,
        usage.router,
        billing.router,
        top_ups.router,
        budgets.router,
        invoices.router,
        notices.router,
        organizations.router,
        new_organization.router,
        prices.router,
        books.router,
        box.router,
        earnings.router,
    ],
    before_request=notices.enter,
    request_max_body_size=MAX_FORM_BYTES,
)
before_session = Router("/console", route_handlers=[entry.router])
static_files = create_static_files_router(
    path=STATIC_PATH,
    directories=[STATIC_DIR],
    cache_control=CacheControlHeader(max_age=YEAR_SECONDS, public=True, immutable=True),
    include_in_schema=False,
    before_request=require_file_name,
)
router = Router(
    "/",
    route_handlers=[home, guide.router, behind_session, before_session, static_files],
    exception_handlers=exception_handlers,  # type: ignore[arg-type]
    request_class=FormRequest,
    after_request=secure,
    include_in_schema=False,
)
