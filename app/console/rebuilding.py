"""Builds a version's upload again, once its owner has said what the model takes."""

from typing import Any

from litestar import Response, Router, post
from litestar.params import FromPath

from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, page
from app.console.uploads import submit
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.registry import service as registry


@post("/models/{name:str}/versions/{number:int}/rebuild", status_code=200)
async def build_again(
    request: PageRequest, name: FromPath[str], number: FromPath[int]
) -> Response[Any]:
    """Queues the same upload as the next version. What cannot be read is shown again, with what is
    wrong with it."""
    principal = signed_in(request).principal
    principal.require("write")
    database: Database = request.app.state.database
    async with database.read() as session:
        version = await registry.get_version(session, principal.organization_id, name, number)
    try:
        made = await submit(request, name, version.upload_id)
    except InvalidRequest as error:
        return page(
            request,
            "models/inputs.html",
            status_code=error.status,
            name=name,
            number=number,
            inputs=await form_field(request, "inputs"),
            accepts_loss=bool(await form_field(request, "accepts_loss")),
            had_inputs=bool(await form_field(request, "had_inputs")),
            error=error.message,
        )
    return go(request, f"/console/models/{name}/versions/{made.number}")


router = Router("", route_handlers=[build_again])
