"""What changes something begins with what its caller may at that moment: every such route of the
application, called by a key with a spending limit, and by keys and people who lost their rights
after they were recognised. Of a request under way, the database alone knows that."""

import asyncio
from collections.abc import AsyncIterator
from unittest.mock import patch

import msgspec
import pytest
from sqlalchemy import delete, update

from app.billing.key_limits import limit_key
from app.organizations.keys import get_key, revoke_key
from app.organizations.tables import Membership, SignIn
from app.settings import Settings
from tests.app.tenancy_objects import MARK, Rows, add_objects, read_rows
from tests.app.tenancy_rules import RULES
from tests.app.test_tenancy import KNOWN, READS, World
from tests.app.whole_app import Tenant, add_tenant, client, running

# Of the operator's: they look at what there is.
COMPARING = {
    *("POST /api/prices/preview", "POST /api/reconciliation", "POST /api/seals/verify"),
    "POST /console/books",
}
CHANGING = [
    route
    for route in KNOWN
    if RULES[route].needs in ("write", "admin", "operator")
    and not route.startswith(READS)
    and route not in COMPARING
]
# What takes the scope write and is put in line: files that arrive, builds, and searches for faster
# forms. Their own transactions are of what they do, some time after they were asked for.
IN_LINE = ("/uploads", "/console/upload", "versions")
OF_API = [route for route in CHANGING if "/console" not in route]
PAGES = [route for route in CHANGING if "/console" in route]


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    """Of a box that takes payments, which nobody answers: nothing here gets so far."""
    settings = msgspec.structs.replace(
        settings,
        stripe_api_key="sk_test_nobody",
        stripe_api_base="http://127.0.0.1:9",
        stripe_webhook_secrets=("whsec_nobody",),
    )
    async with running(settings, has_clerk=False) as application:
        operator = await add_tenant(application, "operators", is_operator=True)
        owner = await add_tenant(application, f"{MARK} limited")
        owned = await add_objects(application, owner)
        yield World(application, owner, owner, operator, owned)


def is_in_line(route: str) -> bool:
    return RULES[route].needs == "write" and any(part in route for part in IN_LINE)


def caller_of(world: World, route: str) -> Tenant:
    return world.operator if RULES[route].needs == "operator" else world.owner


async def refusals(
    world: World, routes: list[str], status: int, code: str = ""
) -> tuple[list[str], Rows]:
    """What is wrong with the answers, and the database after them."""
    problems: list[str] = []
    for route in routes:
        call = world.call(route, caller_of(world, route), RULES[route])
        answer = await world.send(call)
        if answer.status_code != status or code not in answer.text:
            problems.append(f"{route}: {answer.status_code} {answer.text[:200]}")
    return problems, await read_rows(world.database)


def changed(before: Rows, after: Rows) -> list[str]:
    """But for when a key was used last."""
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in before.keys() | after.keys()
        if key[0] != "api_key" and before.get(key) != after.get(key)
    ]


async def test_a_key_with_a_limit_changes_nothing_that_takes_the_scope_admin(world: World) -> None:
    async with world.database.write() as session:
        for tenant in (world.owner, world.operator):
            key = await get_key(session, tenant.id, tenant.key_id)
            await limit_key(session, key, "month", 10**15, currency="usd")
    before = await read_rows(world.database)
    routes = [route for route in OF_API if RULES[route].needs != "write"]
    problems, after = await refusals(world, routes, 403, "key_limited")
    assert not problems, "\n".join(problems)
    assert changed(before, after) == []
    async with client(world.application) as http:
        headers = world.owner.bearer
        secret = await http.get("/api/notices/settings", headers=headers)
        assert (secret.status_code, secret.json()["error"]["code"]) == (403, "key_limited")
        endpoint = f"/api/endpoints/{MARK}-model"
        for body, status in (({"is_default": True}, 403), ({"is_public": False}, 200)):
            answer = await http.patch(endpoint, headers=headers, json=body)
            assert answer.status_code == status
        # The one thing that it may end is itself.
        own = f"/api/keys/{world.owner.key_id}"
        assert (await http.delete(own, headers=headers)).status_code == 204


async def test_a_key_that_is_revoked_under_way_changes_nothing(world: World) -> None:
    key_ring = world.application.state.key_ring
    tenants = (world.owner, world.operator)
    known = {tenant.secret: await key_ring.authenticate(tenant.secret) for tenant in tenants}

    async def recognise(secret: str) -> object:
        return known[secret]

    async with world.database.write() as session:
        for tenant in tenants:
            await revoke_key(session, tenant.id, tenant.key_id)
    before = await read_rows(world.database)
    with patch.object(key_ring, "authenticate", recognise):
        routes = [route for route in OF_API if not is_in_line(route)]
        problems, after = await refusals(world, routes, 401)
    assert not problems, "\n".join(problems)
    assert changed(before, after) == []


@pytest.mark.parametrize(
    ("how", "status"), [("removed", 403), ("demoted", 403), ("signed out", 401)]
)
async def test_a_person_who_loses_their_rights_under_way_changes_nothing(
    world: World, how: str, status: int
) -> None:
    sign_ins = world.application.state.sign_ins
    tokens = [tenant.cookies["tapeout_session"] for tenant in (world.owner, world.operator)]
    known = {token: await sign_ins.authenticate(token) for token in tokens}

    async def recognise(token: str) -> object:
        return known[token]

    async with world.database.write() as session:
        for person in known.values():
            its = Membership.user_id == person.principal.user_id
            if how == "removed":
                await session.execute(delete(Membership).where(its))
            elif how == "demoted":
                await session.execute(update(Membership).where(its).values(role="viewer"))
            else:
                await session.execute(delete(SignIn))
    before = await read_rows(world.database)
    with patch.object(sign_ins, "authenticate", recognise):
        routes = [route for route in PAGES if not is_in_line(route)]
        problems, after = await refusals(world, routes, status)
    assert not problems, "\n".join(problems)
    assert changed(before, after) == []


MONEY = (
    "POST /api/organizations/{organization_id}/credits",
    "PATCH /api/organizations/{organization_id}",
    "PUT /api/device-cost",
    "POST /api/prices",
    "POST /api/keys",
)


@pytest.mark.parametrize("how", ["revoked", "limited"])
async def test_what_waits_while_its_key_is_taken_away_changes_nothing(
    world: World, how: str
) -> None:
    world.owner = world.operator  # whose key it is
    async with world.database.write() as session:
        key = await get_key(session, world.operator.id, world.operator.key_id)
        if how == "revoked":
            await revoke_key(session, world.operator.id, key.id)
        else:
            await limit_key(session, key, "month", 0, currency="usd")
        await session.flush()
        calls = [world.call(route, world.operator, RULES[route]) for route in MONEY]
        waiting = [asyncio.create_task(world.send(call)) for call in calls]
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in waiting)
    answers = await asyncio.gather(*waiting)
    assert {answer.status_code for answer in answers} == {401 if how == "revoked" else 403}


async def test_changes_at_once_do_not_wait_for_each_other_in_a_circle(world: World) -> None:
    """Of people, keys and money, in two organizations, of which one changes the other's."""
    routes = (
        *MONEY,
        *("PUT /api/budgets", "PUT /api/billing/contact", "PUT /api/notices/settings"),
        *("POST /api/members/invitations", "PATCH /api/members/{user_id}"),
        *("POST /console/billing/contact", "POST /console/keys", "DELETE /api/keys/{key_id}"),
        *("POST /console/members/{user_id}/role", "POST /console/billing/limit"),
    )
    calls = [world.call(route, caller_of(world, route), RULES[route]) for route in routes]
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(world.send(call) for call in calls * 4))
        await world.application.state.key_ring.flush()
    problems = {
        f"{call.method} {call.path}: {answer.status_code} {answer.text[:200]}"
        for call, answer in zip(calls * 4, answers, strict=True)
        if answer.status_code >= 400 and answer.status_code not in (404, 409)
    }
    assert not problems, "\n".join(problems)
