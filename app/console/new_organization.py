"""Letting others in on the box: a new organization, and one-time links for owners of one."""

from litestar import Response, Router, post
from litestar.params import FromPath

from app.api.writing import writing
from app.billing.ledger import lock_account
from app.billing.service import set_spending_limit
from app.console.organizations import show_list
from app.console.sessions import form_field, signed_in
from app.console.templating import PageRequest, base_url
from app.core.errors import AppError
from app.organizations.invitations import PATH, invite_owner
from app.organizations.service import checked_new_name, create_organization, get_organization
from app.settings import Settings


@post("/organizations", status_code=200)
async def make_organization(request: PageRequest) -> Response[str]:
    """A prepaid one, and the link for its owner, which the answer shows this once."""
    principal = signed_in(request).principal
    principal.require_operator()
    sent = await form_field(request, "name")
    settings: Settings = request.app.state.settings
    try:
        async with writing(request, principal, "admin", operator=True) as session:
            name = await checked_new_name(session, sent)
            made = await create_organization(session, name)
            await lock_account(session, made.id, settings.currency)
            await set_spending_limit(session, made.id, 0, settings.currency)
            _, token = await invite_owner(session, principal, made.id, "the first owner")
    except AppError as error:
        return await show_list(request, error=error, name=sent)
    return await show_list(request, link=f"{base_url(request)}{PATH}{token}", made=name)


@post("/organizations/{organization_id:str}/owner", status_code=200)
async def link_owner(request: PageRequest, organization_id: FromPath[str]) -> Response[str]:
    """For an organization that has no owner yet."""
    principal = signed_in(request).principal
    principal.require_operator()
    async with writing(request, principal, "admin", operator=True) as session:
        _, token = await invite_owner(
            session, principal, organization_id, "the first owner, by the operator"
        )
        organization = await get_organization(session, organization_id)
    link = f"{base_url(request)}{PATH}{token}"
    return await show_list(request, link=link, made=organization.name)


router = Router("", route_handlers=[make_organization, link_owner])
