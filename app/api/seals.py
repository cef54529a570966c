"""`/api/seals`: the chain of seals over the box's ledger, and verifying all of it."""

from typing import Annotated, Any

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.params import QueryParameter

from app.api.auth import bearer_principal
from app.billing.proofs import SignedSeal
from app.billing.records import Records
from app.billing.seal_check import ChainCheck

AnyRequest = Request[Any, Any, Any]
MAX_SEALS = 1_000
CHECK_SECONDS = 5  # of one call; the next goes on where it ended


class SealsAnswer(msgspec.Struct, frozen=True):
    """Each seal's `sha256` is of the fields before it, and in the next one's
    `previous_sha256`."""

    public_key: str
    seals: list[SignedSeal]
    object: str = "list"


@get("/", summary="Seals over the ledger")
async def get_seals(
    request: AnyRequest,
    after: Annotated[int | None, QueryParameter(ge=0, le=2**62)] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=MAX_SEALS)] = 100,
) -> Response[SealsAnswer]:
    """The newest first or, with `after`, those that follow that number, in order. Hashes only:
    whoever keeps them can tell later that nothing before them was changed."""
    await bearer_principal(request)
    records: Records = request.app.state.records
    seals = await records.heads(after, limit)
    return Response(SealsAnswer(records.public_key, seals))


@post("/verify", status_code=200, summary="Verify the ledger")
async def verify_seals(
    request: AnyRequest,
    after: Annotated[int, QueryParameter(ge=0, le=2**62)] = 0,
) -> Response[ChainCheck]:
    """For the operator: recomputes receipts, ledger and seals from the seal after `after` on, for
    some seconds. While `is_complete` is false, go on after `last_number`."""
    principal = await bearer_principal(request)
    principal.require_operator()
    records: Records = request.app.state.records
    return Response(await records.check(after, CHECK_SECONDS))


router = Router("/api/seals", route_handlers=[get_seals, verify_seals], tags=["Usage"])
