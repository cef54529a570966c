"""The page Overview, where people start: what is used and spent, what runs, what was built."""

from litestar import Response, Router, get

from app.console.overview_view import read_overview
from app.console.sessions import signed_in
from app.console.templating import PageRequest, base_url, page
from app.core.database import Database
from app.settings import Settings


@get("/overview")
async def show_overview(request: PageRequest) -> Response[str]:
    """How the organization does now; before its first model, how to get there."""
    principal = signed_in(request).principal
    principal.require("read")
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    async with database.read() as session:
        view = await read_overview(session, principal.organization_id, settings.currency)
    return page(
        request,
        "overview/overview.html",
        view=view,
        device=settings.device,
        base_url=base_url(request),
    )


router = Router("", route_handlers=[show_overview])
