"""Every management route: anonymous 401, without the scope 403, another organization's 404. The
list of routes is read from the application, so that a new one cannot be forgotten."""

from typing import Any

import httpx
from sqlalchemy import func, select

from app.core.database import Database
from app.main import create_app
from app.organizations.principal import SCOPES
from app.organizations.tables import ApiKey
from app.registry.tables import Model, Upload
from app.settings import Settings
from tests.app.api.management.callers import Caller, make_caller
from tests.app.api.management.serving import Serving

# (method, path) -> (scope, body). `{...}` is filled with things of the caller's.
ROUTES: dict[tuple[str, str], tuple[str, Any]] = {
    ("GET", "/api/keys"): ("admin", None),
    ("POST", "/api/keys"): ("admin", {"name": "ci"}),
    ("DELETE", "/api/keys/{key_id}"): ("admin", None),
    ("GET", "/api/organization"): ("read", None),
    ("GET", "/api/uploads"): ("write", None),
    ("POST", "/api/uploads"): ("write", None),
    ("POST", "/api/uploads/{upload_id}"): ("write", None),
    ("HEAD", "/api/uploads/{upload_id}"): ("write", None),
    ("PATCH", "/api/uploads/{upload_id}"): ("write", None),
    ("DELETE", "/api/uploads/{upload_id}"): ("write", None),
    ("GET", "/api/models"): ("read", None),
    ("GET", "/api/models/{name}"): ("read", None),
    ("DELETE", "/api/models/{name}"): ("write", None),
    ("POST", "/api/models/{name}/versions"): ("write", {"upload_id": "{upload_id}"}),
    ("GET", "/api/models/{name}/versions/{number}"): ("read", None),
    ("GET", "/api/models/{name}/versions/{number}/log"): ("read", None),
    ("POST", "/api/models/{name}/versions/{number}/cancel"): ("write", None),
    ("POST", "/api/models/{name}/versions/{number}/optimise"): ("write", None),
    ("POST", "/api/models/{name}/versions/{number}/optimise/cancel"): ("write", None),
    ("GET", "/api/models/{name}/versions/{number}/receipt"): ("read", None),
    ("GET", "/api/deployments"): ("read", None),
    ("GET", "/api/deployments/{endpoint}"): ("read", None),
    ("PATCH", "/api/deployments/{endpoint}"): ("write", {"num_replicas": 1}),
    ("GET", "/api/deployments/{endpoint}/revisions"): ("read", None),
    ("POST", "/api/deployments/{endpoint}/stop"): ("write", None),
    ("POST", "/api/deployments/{endpoint}/start"): ("write", None),
    ("POST", "/api/deployments/{endpoint}/rollback"): ("write", {}),
    ("GET", "/api/deployments/{endpoint}/log"): ("read", None),
    ("PATCH", "/api/endpoints/{endpoint}"): ("write", {"is_public": True}),
}
# Routes that `test_tenancy.py` alone goes through, as it does through all: they need the whole
# application.
TESTED_WHOLE = (
    "/api/billing",
    "/api/budgets",
    "/api/default-model",
    "/api/device-cost",
    "/api/credits",
    "/api/earnings",
    "/api/invoices",
    "/api/members",
    "/api/notices",
    "/api/organizations",
    "/api/payments",
    "/api/prices",
    "/api/reconciliation",
    "/api/seals",
    "/api/usage",
)


async def call(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    headers: dict[str, str],
    serving: Serving,
    names: dict[str, Any] | None = None,
) -> httpx.Response:
    names = names or serving.names()
    body = ROUTES[method, path][1]
    if body and "upload_id" in body:
        body = {"upload_id": names["upload_id"]}
    tus = {
        "Tus-Resumable": "1.0.0",
        "Upload-Offset": "0",
        "Upload-Length": "10",
        "X-HTTP-Method-Override": "HEAD",  # for POST alone
        "Content-Type": "application/offset+octet-stream",
    }
    headers = headers | (tus if "/uploads" in path else {})
    return await client.request(method, path.format(**names), headers=headers, json=body)


def test_every_route_is_listed(settings: Settings) -> None:
    found = {
        (method, route.path_format)
        for route in create_app(settings).routes
        for method in getattr(route, "route_handler_map", {})
        if route.path_format.startswith("/api") and method != "OPTIONS"
    }
    found -= {route for route in found if route[1].startswith(TESTED_WHOLE)}
    assert found == {*ROUTES, ("PATCH", "/api/organization")}  # the operator's, see test_keys.py


async def test_anonymous(client: httpx.AsyncClient, serving: Serving) -> None:
    nobody: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer tp-invented"},
        {"Authorization": "Basic dTpw"},
        {"Cookie": "tapeout_session=x"},
    ]
    for method, path in ROUTES:
        for headers in nobody:
            response = await call(client, method, path, headers, serving)
            assert response.status_code == 401, (method, path, headers)
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert response.json()["error"]["type"] == "authentication_error"


async def test_missing_scope(
    client: httpx.AsyncClient, database: Database, serving: Serving
) -> None:
    limited = {
        scope: await make_caller(database, serving.caller.organization_id, SCOPES - {scope})
        for scope in ("read", "write", "admin")
    }
    for (method, path), (scope, _) in ROUTES.items():
        response = await call(client, method, path, limited[scope].headers, serving)
        assert response.status_code == 403, (method, path)
        if method != "HEAD":
            error = response.json()["error"]
            assert error["code"] == "missing_scope"
            assert f"'{scope}'" in error["message"]


async def test_another_organization(
    client: httpx.AsyncClient, database: Database, serving: Serving, stranger: Caller
) -> None:
    invented = dict.fromkeys(serving.names(), "x") | {"number": 9}
    for method, path in ROUTES:
        if "{" not in path:
            continue
        foreign = await call(client, method, path, stranger.headers, serving)
        assert foreign.status_code == 404, (method, path)
        unknown = await call(client, method, path, stranger.headers, serving, invented)
        assert unknown.status_code == 404, (method, path)
        if method != "HEAD":  # nothing tells the two apart but the names that were sent
            errors = [response.json()["error"] for response in (foreign, unknown)]
            assert errors[0]["code"] == errors[1]["code"]
            assert errors[0]["type"] == errors[1]["type"]
    async with database.read() as session:
        assert await session.scalar(select(func.count()).select_from(Model)) == 1
        assert await session.scalar(select(func.count()).select_from(Upload)) == 2
        assert await session.scalar(select(ApiKey.revoked_at)) is None


async def test_the_owner_gets_through(client: httpx.AsyncClient, serving: Serving) -> None:
    def is_last(route: tuple[str, str]) -> tuple[bool, bool]:
        return route[0] == "DELETE", "key" in route[1]

    for method, path in sorted(ROUTES, key=is_last):
        response = await call(client, method, path, serving.caller.headers, serving)
        assert response.status_code < 300 or response.status_code == 409, (method, path)
