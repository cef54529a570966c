"""Every error has the one body, and says nothing of the box's inside."""

import logging

import httpx
import pytest
from litestar import Litestar, Response, get
from litestar.exceptions import HTTPException

from app.api.errors import EXCEPTION_HANDLERS
from app.core.errors import AppError, RateLimited
from tests.app.api.management.callers import Caller


async def test_unknown_url_and_wrong_method(client: httpx.AsyncClient, caller: Caller) -> None:
    response = await client.get("/api/nothing", headers=caller.headers)
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "There is nothing at GET /api/nothing.",
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_url",
    }
    response = await client.put("/api/keys", headers=caller.headers)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "GET" in response.headers["allow"]


async def test_body_that_is_too_large(client: httpx.AsyncClient, caller: Caller) -> None:
    body = b'{"name": "' + b"x" * (32 * 1024**2) + b'"}'
    response = await client.post("/api/keys", headers=caller.headers, content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")


async def test_body_that_is_missing(client: httpx.AsyncClient, caller: Caller) -> None:
    json = {"Content-Type": "application/json"}
    for headers in (caller.headers, caller.headers | json):
        response = await client.post("/api/keys", headers=headers)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["message"], error["param"]) == ("The body is missing: send JSON.", None)


async def test_body_that_is_not_json(client: httpx.AsyncClient, caller: Caller) -> None:
    for body in (b"{", b"\xff\xfe", b"[" * 100_000):
        response = await client.post("/api/keys", headers=caller.headers, content=body)
        assert response.status_code == 400, body[:10]
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path",
    [
        "/api/models/a%00b",
        "/api/deployments/a%00b/log",
        f"/api/models/a/versions/{10**30}",
        f"/api/models/a/versions/{2**40}",
    ],
)
async def test_values_that_no_database_holds_are_no_faults(
    client: httpx.AsyncClient, caller: Caller, path: str
) -> None:
    """SQLite and PostgreSQL disagree on what they look for in vain and what they refuse."""
    response = await client.get(path, headers=caller.headers)
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@get("/fault", sync_to_thread=False)
def fault() -> None:
    raise RuntimeError("the password is in /etc/secret")


@get("/limited", sync_to_thread=False)
def limited() -> None:
    raise RateLimited("Slower.", retry_after_seconds=7, param="model")


@get("/odd", sync_to_thread=False)
def odd() -> None:
    raise HTTPException(detail="teapot", status_code=418)


@get("/fine", sync_to_thread=False)
def fine() -> Response[str]:
    return Response("ok")


@pytest.fixture
def plain() -> httpx.AsyncClient:
    app = Litestar(
        [fault, limited, odd, fine],
        exception_handlers=EXCEPTION_HANDLERS,  # type: ignore[arg-type]
        openapi_config=None,
        logging_config=None,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://box")


async def test_a_fault_is_logged_under_the_id_that_is_told(
    plain: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "app.api.errors"):
        response = await plain.get("/fault")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.getMessage().split()[0] in response.json()["error"]["message"]


async def test_retry_after(plain: httpx.AsyncClient) -> None:
    response = await plain.get("/limited")
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert response.json()["error"] == {
        "message": "Slower.",
        "type": "rate_limit_error",
        "param": "model",
        "code": "rate_limited",
    }


async def test_what_the_framework_might_yet_raise(plain: httpx.AsyncClient) -> None:
    response = await plain.get("/odd")
    assert response.status_code == 500
    assert "teapot" not in response.text


def test_every_app_error_has_a_status_type_and_code() -> None:
    def kinds(kind: type[AppError]) -> list[type[AppError]]:
        return [kind, *(k for sub in kind.__subclasses__() for k in kinds(sub))]

    for kind in kinds(AppError):
        assert 400 <= kind.status < 600
        assert kind.type
        assert kind.default_code
