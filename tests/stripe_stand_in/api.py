"""Stripe's API without its transport: from a request to its answer, through keys and faults.

In the order that Stripe has them: who asks, the idempotency key, the parameters, and only then
the execution, whose outcome is saved under the key.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import stripe

from tests.stripe_stand_in import parameters, routes
from tests.stripe_stand_in.account import Account
from tests.stripe_stand_in.errors import ApiError, Object, fault, in_use, invalid
from tests.stripe_stand_in.faults import Fault, Faults
from tests.stripe_stand_in.idempotency import Answer, Keys

_BUSY_CODES = {"busy": "rate_limit", "locked": "lock_timeout"}


class ConnectionLost(Exception):
    """The request or its answer is lost: the connection is to be closed without a word. With
    "crash", all others too."""


@dataclass
class Request:
    """One request, and what became of it, for tests to look at."""

    method: str
    path: str
    params: Object  # decoded; the leaves are strings, as sent
    key: str
    status: int = 0  # 0 = the connection was lost
    fault: str = ""
    is_replay: bool = False
    error: Object = field(default_factory=dict)


class Api:
    """Answers requests. Thread-safe."""

    def __init__(self, account: Account, faults: Faults, keys: Keys, api_key: str) -> None:
        self.requests: list[Request] = []
        self._account = account
        self._faults = faults
        self._keys = keys
        self._api_key = api_key

    def answer(self, method: str, path: str, form: str, headers: Mapping[str, str]) -> Answer:
        key = headers.get("Idempotency-Key", "") if method == "POST" else ""
        request = Request(method, path, parameters.decode(form), key)
        with self._account.lock:
            self.requests.append(request)
            fault = self._faults.pick(method, path)
        request.fault = fault.kind if fault else ""
        try:
            answer = self._answer(request, form, headers, fault)
        except ApiError as error:
            answer = _error(error)
        if request.fault in ("lose_reply", "crash"):
            raise ConnectionLost(request.fault)
        if request.fault == "bad_gateway":
            answer = Answer(502, b"<html><h1>502 Bad Gateway</h1></html>")
        request.status = answer.status
        request.error = json.loads(answer.body)["error"] if 400 <= answer.status != 502 else {}
        request.is_replay = "Idempotent-Replayed" in answer.headers
        id_headers = {"Request-Id": f"req_{len(self.requests):014d}"}
        return Answer(answer.status, answer.body, id_headers | answer.headers)

    def _answer(
        self, request: Request, form: str, headers: Mapping[str, str], fault: Fault | None
    ) -> Answer:
        _refuse_before(fault)
        self._check_headers(headers)
        if not request.key:
            return self._execute(request, fault)
        with self._account.lock:
            saved = self._keys.begin(request.key, (request.method, request.path, form))
        if saved is not None:
            return saved
        try:
            answer = self._execute(request, fault)
        except ApiError as error:
            if not error.is_saved:
                self._keys.forget(request.key)
                raise
            answer = _error(error)
        except BaseException:
            self._keys.forget(request.key)
            raise
        self._keys.end(request.key, answer)
        return answer

    def _check_headers(self, headers: Mapping[str, str]) -> None:
        if headers.get("Authorization") != f"Bearer {self._api_key}":
            raise ApiError(401, "Invalid API Key provided: sk_test_****", is_saved=False)
        version = headers.get("Stripe-Version")
        if version != stripe.api_version:
            raise invalid(f"Invalid Stripe API version: {version}")

    def _execute(self, request: Request, failing: Fault | None) -> Answer:
        kind = failing.kind if failing else ""
        if kind == "slow":
            time.sleep(failing.seconds)  # type: ignore[union-attr]
        found = routes.find(request.method, request.path)
        if found is None:
            url = f"{request.method}: {request.path}"
            raise ApiError(404, f"Unrecognized request URL ({url}).", is_saved=False)
        route, ids = found
        params = parameters.check(request.params, route.params)
        if kind == "reject":
            raise ApiError(400, "A rule of Stripe's forbids this.", code="not_allowed_here")
        if kind == "fail_saved":
            raise fault()
        with self._account.lock:
            self._account.request = {"id": "req_standin", "idempotency_key": request.key or None}
            try:
                done = route.handler(self._account, params, *ids)
                done = self._account.expanded(done, params.get("expand", []))
            finally:
                self._account.request = {"id": None, "idempotency_key": None}
        if kind == "fail_after":
            raise fault()
        return Answer(200, json.dumps(done, indent=2).encode())


def _refuse_before(failing: Fault | None) -> None:
    """Faults of what stands before the API: nothing is done and nothing saved."""
    kind = failing.kind if failing else ""
    if kind == "lose_request":
        raise ConnectionLost(kind)
    if kind == "in_use":
        raise in_use()
    if kind == "fail_before":
        raise ApiError(500, "An unknown error occurred", type="api_error", is_saved=False)
    if failing is not None and kind in _BUSY_CODES:
        raise ApiError(
            429,
            "Too many requests hit the API too quickly, or the object is locked.",
            code=_BUSY_CODES[kind],
            headers={"Retry-After": str(failing.seconds)},
            is_saved=False,
        )


def _error(error: ApiError) -> Answer:
    body: Any = error.body
    return Answer(error.status, json.dumps(body, indent=2).encode(), error.headers)
