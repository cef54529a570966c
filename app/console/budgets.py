"""The forms about budgets on the page Billing."""

from typing import Any

from litestar import Response, Router, post
from litestar.params import FromPath

from app.api.budgets import name_of
from app.api.writing import writing
from app.billing import budgets
from app.console.billing import HERE, billing_page
from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest
from app.core.errors import AppError, InvalidRequest
from app.core.money import parse_amount
from app.settings import Settings


@post("/billing/budgets", status_code=200)
async def set_budget(request: PageRequest) -> Response[Any]:
    """Sets or changes one. `of` is a scope and, parted by a colon, the key's id or the model."""
    principal = signed_in(request).principal
    principal.require("admin")
    sent = {name: await form_field(request, name) for name in ("of", "period", "limit")}
    scope, _, subject = sent["of"].partition(":")
    settings: Settings = request.app.state.settings
    try:
        limit_nano = _limit(sent["limit"])
        async with writing(request, principal, "admin") as session:
            await budgets.set_budget(
                session,
                principal.organization_id,
                scope=scope,
                subject=subject,
                subject_name=await name_of(session, principal.organization_id, scope, subject),
                period=sent["period"],
                limit_nano=limit_nano,
                currency=settings.currency,
            )
    except AppError as error:
        return await billing_page(request, error=error, sent=sent)
    return go(request, f"{HERE}?notice=budget#budgets")


@post("/billing/budgets/{budget_id:str}/delete", status_code=200)
async def delete_budget(request: PageRequest, budget_id: FromPath[str]) -> Response[Any]:
    """What runs goes on; nothing is counted in it any more."""
    principal = signed_in(request).principal
    principal.require("admin")
    async with writing(request, principal, "admin") as session:
        await budgets.delete_budget(session, principal.organization_id, budget_id)
    return go(request, f"{HERE}?notice=budget-gone#budgets")


def _limit(text: str) -> int:
    try:
        return parse_amount(text)
    except ValueError as error:
        raise InvalidRequest(f"A budget is {error}.", param="limit") from None


router = Router("", route_handlers=[set_budget, delete_budget])
