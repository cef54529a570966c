"""`/healthz`: the process answers. `/readyz`: it can serve, because its database answers too."""

from typing import Any

from litestar import Request, Response, Router, get
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.core.database import Database


@get("/healthz", sync_to_thread=False, summary="Is the process alive")
def show_health() -> dict[str, str]:
    """Whether the process runs; asks nothing else."""
    return {"status": "ok"}


@get("/readyz", summary="Can it serve")
async def show_readiness(request: Request[Any, Any, Any]) -> Response[dict[str, str]]:
    """200 when requests can be served, 503 with the reason when not."""
    database: Database = request.app.state.database
    try:
        async with database.read() as session:
            await session.execute(text("SELECT 1"))
    except SQLAlchemyError:
        return Response({"status": "the database does not answer"}, status_code=503)
    return Response({"status": "ready"})


router = Router("", route_handlers=[show_health, show_readiness], tags=["Health"])
