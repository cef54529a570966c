"""Nobody reads or moves what another organization owns: every route that the application has,
called by an organization for what another one owns, by callers who lack what it takes, and by
nobody. A route that has no rule in `tenancy_rules.py` fails here."""

import json
import re
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import msgspec
import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute
from sqlalchemy import update

from app.core.database import Database
from app.main import create_app
from app.organizations.keys import create_key
from app.organizations.principal import SCOPES
from app.organizations.tables import Membership
from app.settings import Settings
from tests.app.tenancy_objects import (
    AMOUNT_MARKS,
    MARK,
    Owned,
    add_objects,
    differences,
    ids_in,
    read_rows,
)
from tests.app.tenancy_rules import NEUTRAL, RULES, Rule
from tests.app.whole_app import URL, Tenant, add_tenant, client, running

REFUSED = (403, 404)
PARAMETER = re.compile(r"\{(\w+)\}")


def routes_of(application: Litestar) -> list[str]:
    """`METHOD /path/{parameter}` of every route."""
    return sorted(
        f"{method} {route.path_format}"
        for route in application.routes
        if isinstance(route, HTTPRoute)
        for method in route.methods - {"OPTIONS"}
    )


ROUTES = routes_of(create_app(Settings()))
READS = ("GET ", "HEAD ")
SIGN_OUT = "POST /console/sign-out"  # after which its session is of no use
KNOWN = sorted((route for route in ROUTES if route in RULES), key=lambda route: route == SIGN_OUT)


class Call(msgspec.Struct, frozen=True):
    """A request, and which of the owner's things it names."""

    method: str
    path: str
    options: dict[str, Any]
    named: list[str]


class World:
    """Two customers, of whom the first owns one of everything, and the operator."""

    def __init__(
        self, application: Litestar, owner: Tenant, other: Tenant, operator: Tenant, owned: Owned
    ) -> None:
        self.application = application
        self.database: Database = application.state.database
        self.owner, self.other, self.operator = owner, other, operator
        self._values = NEUTRAL | msgspec.structs.asdict(owned)
        self._values["book_id"] = application.state.prices.active.id

    def call(self, route: str, caller: Tenant | None, rule: Rule) -> Call:
        """The rule's request for what the owner owns, as this caller would send it."""
        method, template = route.split(" ", 1)
        named: list[str] = []
        path = self._filled(template, named)
        options: dict[str, Any] = {"headers": dict(rule.headers)}
        if rule.json is not None:
            options["json"] = json.loads(self._filled(json.dumps(rule.json), named))
        if rule.content is not None:
            options["content"] = rule.content
        form = rule.form
        if form is not None:
            options["data"] = {name: self._filled(text, named) for name, text in form.items()}
        if template.startswith("/console"):
            options["headers"]["Origin"] = URL
            if caller is not None:
                options["headers"]["X-CSRF-Token"] = caller.csrf_token
                options["cookies"] = caller.cookies
        elif caller is not None:
            options["headers"] |= caller.bearer
        return Call(method, path + rule.query, options, named)

    def _filled(self, template: str, named: list[str]) -> str:
        """Notes what it names of the owner's."""

        def value(found: re.Match[str]) -> str:
            name = found[1]
            if name not in NEUTRAL and name != "book_id":
                named.append(self._values[name])
            return self._values[name]

        return PARAMETER.sub(value, template)

    async def send(self, call: Call) -> httpx.Response:
        """With a client of its own: cookies of one call are not the next one's."""
        options = dict(call.options)
        cookies = options.pop("cookies", {})
        async with client(self.application) as http:
            http.cookies.update(cookies)
            return await http.request(call.method, call.path, **options)


@pytest.fixture
async def world(settings: Settings) -> AsyncIterator[World]:
    async with running(settings, has_clerk=False) as application:
        operator = await add_tenant(application, "operators", is_operator=True)
        owner = await add_tenant(application, f"{MARK} limited")
        other = await add_tenant(application, "stranger")
        owned = await add_objects(application, owner)
        yield World(application, owner, other, operator, owned)


def test_every_route_has_a_rule_and_every_rule_a_route() -> None:
    assert [route for route in ROUTES if route not in RULES] == [], "say in RULES what these ask"
    assert sorted(set(RULES) - set(ROUTES)) == [], "there are no such routes"
    unknown = {name for route in ROUTES for name in PARAMETER.findall(route)} - {
        *NEUTRAL,
        *Owned.__struct_fields__,
        "book_id",
    }
    assert unknown == set(), "add_objects must make one of these, for the stranger to ask for"


async def test_nobody_reads_or_moves_what_is_anothers(world: World) -> None:
    problems: list[str] = []
    rows = await read_rows(world.database)
    marks = ids_in(rows, {world.owner.id, MARK}) - {world.application.state.prices.active.id}
    reading = [route for route in KNOWN if route.startswith(READS)]
    for route in [*reading, *(route for route in KNOWN if route not in reading)]:
        rule = RULES[route]
        call = world.call(route, world.other, rule)
        answer = await world.send(call)
        problems += [f"{route}: {told}" for told in _wrong(rule, call, answer, marks)]
        if route in reading[:-1]:
            continue  # looked at together, after the last that only reads
        after = await read_rows(world.database)
        problems += [f"{route} moved {told}" for told in differences(rows, after, marks)]
        rows = after
    assert not problems, "\n".join(problems)


def _wrong(rule: Rule, call: Call, answer: httpx.Response, marks: set[str]) -> Iterable[str]:
    """What is wrong with the answer to a stranger."""
    if answer.status_code >= 500 and answer.status_code != 501:
        yield f"answered {answer.status_code}: {answer.text[:500]}"
    if rule.needs == "operator" and answer.status_code != 403:
        yield f"is the operator's, but answered {answer.status_code}: {answer.text[:300]}"
    if call.named and answer.status_code not in (*REFUSED, 501):
        yield f"answered {answer.status_code}, not one of {REFUSED}: {answer.text[:300]}"
    text = f"{answer.text} {dict(answer.headers)}"
    for name in [*call.named, call.path]:
        text = text.replace(name, "")  # what the stranger said themselves tells nothing
    leaked = [mark for mark in (*AMOUNT_MARKS, *marks) if mark in text]
    if leaked:
        yield f"told {leaked} in {answer.text[:300]}"


async def test_nobody_gets_in_without_saying_who_they_are(world: World) -> None:
    problems: list[str] = []
    before = await read_rows(world.database)
    for route in KNOWN:
        rule = RULES[route]
        answer = await world.send(world.call(route, None, rule))
        status, where = answer.status_code, answer.headers.get("location", "")
        if rule.needs == "public":
            continue
        if rule.needs == "entry":
            is_right = status in (200, 303, 400, 403)
        elif rule.needs == "signature":
            is_right = status in (400, 409)
        elif route.split(" ")[1].startswith("/console"):
            is_right = status in (401, 403) or (status == 303 and "/console/sign-in" in where)
        else:
            is_right = status == 401
        if not is_right:
            problems.append(f"{route}: {status} {answer.text[:200]}")
    assert not problems, "\n".join(problems)
    after = await read_rows(world.database)
    assert [key for key in before if before[key] != after.get(key)] == []


async def test_whoever_lacks_the_scope_is_refused(world: World) -> None:
    """Of the owner's own organization: keys without the scope, and a member in the console."""
    keys: dict[str, Tenant] = {}
    async with world.database.write() as session:
        for scope in sorted(SCOPES):
            _, secret = await create_key(session, world.owner.id, scope, SCOPES - {scope})
            keys[scope] = msgspec.structs.replace(world.owner, secret=secret)
        _, secret = await create_key(session, world.owner.id, "none", frozenset({"write"}))
        keys["inference read"] = msgspec.structs.replace(world.owner, secret=secret)
        keys["operator"] = keys["admin"]
        await session.execute(
            update(Membership)
            .where(Membership.organization_id == world.owner.id)
            .values(role="member")
        )
    before = await read_rows(world.database)
    problems: list[str] = []
    for route in KNOWN:
        rule = RULES[route]
        if rule.needs in ("public", "entry", "signature", "key"):
            continue
        is_page = route.split(" ")[1].startswith("/console")
        if is_page and rule.needs not in ("admin", "operator"):
            continue  # every member has the other scopes
        caller = world.owner if is_page else keys[rule.needs]
        answer = await world.send(world.call(route, caller, rule))
        if answer.status_code != 403:
            problems.append(
                f"{route} without {rule.needs}: {answer.status_code} {answer.text[:200]}"
            )
    assert not problems, "\n".join(problems)
    marks = ids_in(before, {world.owner.id, MARK})
    after = {
        key: row for key, row in (await read_rows(world.database)).items() if key[0] != "api_key"
    }
    before = {key: row for key, row in before.items() if key[0] != "api_key"}  # when used last
    assert differences(before, after, marks) == []


async def test_the_matrix_asks_what_its_owner_would_get(world: World) -> None:
    """Or a wrong request would be refused to everybody, and show nothing."""
    problems: list[str] = []
    for route in sorted(KNOWN, key=lambda route: (_is_end(route), route)):
        rule = RULES[route]
        if not rule.is_let_in or rule.needs in ("public", "entry", "signature"):
            continue
        caller = world.operator if rule.needs == "operator" else world.owner
        answer = await world.send(world.call(route, caller, rule))
        if answer.status_code in (400, 401, 403, 404, 405, 415, 422) or answer.status_code == 500:
            problems.append(f"{route}: {answer.status_code} {answer.text[:300]}")
    assert not problems, "\n".join(problems)


def _is_end(route: str) -> int:
    """What ends something comes after all that needs it; the model and the key last of all."""
    if route in ("DELETE /api/models/{name}", "POST /console/models/{name}/delete"):
        return 2
    if route.endswith("keys/{key_id}") or route.endswith("/revoke"):
        return 3
    return int(route.startswith("DELETE") or "delete" in route)
