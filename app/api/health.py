"""`/healthz`: the process answers. `/readyz`: it can serve, because what it needs works too."""

from typing import Any

from litestar import Request, Response, Router, get
from litestar.datastructures import State
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError


@get("/healthz", sync_to_thread=False, summary="Is the process alive")
def show_health() -> dict[str, str]:
    """Whether the process runs; asks nothing else."""
    return {"status": "ok"}


@get("/readyz", summary="Can it serve")
async def show_readiness(request: Request[Any, Any, Any]) -> Response[dict[str, str]]:
    """200 when requests can be served, 503 with the reason when not."""
    if problem := await problem_of(request.app.state):
        return Response({"status": problem}, status_code=503)
    return Response({"status": "ready"})


async def problem_of(state: State) -> str:
    """Why no request can be served, or nothing."""
    return _stopped(state) or await _silent(state)


def _stopped(state: State) -> str:
    """Which part has ended while the process went on, or nothing."""
    if not state.journal.is_alive:
        return "the journal has stopped, see the log; restart the box"
    if not state.accounts.is_alive:
        return "the account writer has stopped, see the log; restart the box"
    if not state.claim.is_held:
        return "the claim on the database is lost, see the log"
    return ""


async def _silent(state: State) -> str:
    try:
        async with state.database.read() as session:
            await session.execute(text("SELECT 1"))
    except SQLAlchemyError:
        return "the database does not answer"
    return ""


router = Router("", route_handlers=[show_health, show_readiness], tags=["Health"])
