"""What each route of the application asks of its caller, and a request that it takes.

The matrix of `test_tenancy.py` is made of the application's own routes; one without a rule here
fails it. `needs` is the least that lets a caller in:

- `public`: nothing, and nothing of an organization is in it.
- `entry`: a form of somebody who has no session yet.
- `signature`: Stripe's.
- `key`: any API key.
- a scope, or several of which any will do.
- `operator`: the scope admin, in the organization that operates the box.
"""

from typing import Any

import msgspec

from tests.app.tenancy_objects import MARK

TUS = {"Tus-Resumable": "1.0.0"}
PIECE = TUS | {"Upload-Offset": "4", "Content-Type": "application/offset+octet-stream"}
BEGIN = TUS | {"Upload-Length": "4", "Upload-Metadata": "filename YS5wdDI=,name YQ=="}
# Values of path parameters that name nothing of anybody's.
NEUTRAL = {
    "number": "1",
    "version": "1",
    "position": "1",
    "verb": "stop",
    "rest": "status",
    "path": "swagger",
    "file_path": "console.css",
    "token": "none",
    "device": "cpu",
}


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """`json`, `form` or `content` is the body; `{name}` in it is an object's, as in paths.
    `is_let_in` false: the owner's own call is not tried, because it would stream, or cannot
    succeed without more than there is in the test."""

    needs: str
    json: Any = None
    form: dict[str, str] | None = None
    content: bytes | None = None
    headers: dict[str, str] = {}
    query: str = ""
    is_let_in: bool = True


def _same(needs: str, *routes: str, **more: Any) -> dict[str, Rule]:
    return {route: Rule(needs=needs, **more) for route in routes}


CHAT = {"model": "{name}", "messages": [{"role": "user", "content": "hi"}]}
V2_INPUTS = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}
BUDGET = {"scope": "key", "subject": "{key_id}", "period": "day", "limit_nano": 5}
PRICES = {"items": [{"dimension": "input", "price_nano": 1, "unit_scale": 1}]}
PRICE_FORM = {
    "action": "confirm",
    "based_on": "{book_id}",
    "dimension-0": "input",
    "service_class-0": "standard",
    "price-0": "1",
    "per-0": "1,000,000",
}
GIFT = {"Idempotency-Key": "one"}
PLAYGROUND = {"text": "hi", "temperature": "1", "max_tokens": "4"}

RULES: dict[str, Rule] = {
    **_same(
        "public",
        *("GET /", "GET /console", "GET /healthz", "GET /readyz"),
        "GET /docs/style.css",
        *("GET /guide", "GET /guide/{name}"),
        *(f"{method} /console/static/{{file_path}}" for method in ("GET", "HEAD")),
        *("GET /v2", "GET /v2/health/live", "GET /v2/health/ready", "GET /v1/receipts/key"),
        is_let_in=False,
    ),
    **_same(
        "entry",
        *("GET /console/sign-in", "GET /console/setup/{token}", "GET /console/invitation/{token}"),
        is_let_in=False,
    ),
    **_same(
        "entry",
        *("POST /console/sign-in", "POST /console/setup/{token}"),
        "POST /console/invitation/{token}",
        form={"email": f"{MARK}@example.com", "password": "four random words here"},
        is_let_in=False,
    ),
    "POST /webhooks/stripe": Rule(needs="signature", content=b"{}", is_let_in=False),
}

# --- calling models ---------------------------------------------------------------------

RULES |= {
    "POST /v1/chat/completions": Rule(needs="inference", json=CHAT),
    "POST /v1/completions": Rule(needs="inference", json={"model": "{name}", "prompt": "hi"}),
    **_same(
        "inference",
        *("POST /v1/responses", "POST /v1/responses/input_tokens"),
        json={"model": "{name}", "input": "hi"},
    ),
    **_same(
        "inference",
        *("POST /v1/messages", "POST /v1/messages/count_tokens"),
        json=CHAT | {"max_tokens": 4},
    ),
    "POST /v1/embeddings": Rule(needs="inference", json={"model": "{name}", "input": "hi"}),
    "POST /models/{name}/predict": Rule(needs="inference", json={"inputs": [1]}),
    **_same("inference", "POST /v2/models/{name}/infer", json=V2_INPUTS),
    **_same("inference", "POST /v2/models/{name}/versions/{version}/infer", json=V2_INPUTS),
    **_same("inference read", "GET /v1/models", "GET /v1/models/{name}"),
    **_same("inference read", "GET /v1/receipts/{request_id}"),
    **_same(
        "inference read",
        *("GET /v2/models/{name}", "GET /v2/models/{name}/config"),
        *("GET /v2/models/{name}/ready", "GET /v2/models/{name}/stats"),
        *("GET /v2/models/{name}/versions/{version}", "GET /v2/models/stats"),
        *(f"GET /v2/models/{{name}}/versions/{{version}}/{what}" for what in ("config", "ready")),
        "GET /v2/models/{name}/versions/{version}/stats",
    ),
    **_same("key", "GET /models/{name}/docs", "GET /models/{name}/openapi.json"),
    "POST /v2/repository/index": Rule(needs="inference read", json={}),
}
"""What Triton has and this box does not: refused alike for everybody."""
UNSUPPORTED = (
    *("GET /v2/logging", "GET /v2/trace/setting", "GET /v2/models/{name}/trace/setting"),
    *(f"GET /v2/{kind}sharedmemory/{{rest}}" for kind in ("cuda", "system")),
    *(f"GET /v2/repository/models/{{name}}/{verb}" for verb in ("load", "unload")),
)
RULES |= _same("public", *UNSUPPORTED, is_let_in=False)
RULES |= _same(
    "public",
    *(route.replace("GET ", "POST ") for route in UNSUPPORTED),
    json={},
    is_let_in=False,
)

# --- models, keys, documentation ----------------------------------------------------------

RULES |= {
    **_same("public", "GET /docs", "GET /docs/openapi.json", "GET /docs/{path}"),
    **_same("public", "GET /openapi.json"),
    **_same("read", "GET /api/models", "GET /api/models/{name}"),
    **_same("read", "GET /api/models/{name}/versions/{number}"),
    **_same("read", "GET /api/models/{name}/versions/{number}/log"),
    **_same("read", "GET /api/models/{name}/versions/{number}/receipt"),
    **_same(
        "write",
        "POST /api/models/{name}/versions",
        json={"upload_id": "{upload_id}"},
        is_let_in=False,
    ),
    **_same("write", "POST /api/models/{name}/versions/{number}/cancel"),
    **_same("write", "POST /api/models/{name}/versions/{number}/optimise"),
    **_same("write", "POST /api/models/{name}/versions/{number}/optimise/cancel"),
    **_same("write", "DELETE /api/models/{name}"),
    **_same("read", "GET /api/deployments", "GET /api/deployments/{endpoint}"),
    **_same("read", "GET /api/deployments/{endpoint}/log"),
    **_same("read", "GET /api/deployments/{endpoint}/revisions"),
    **_same("write", "PATCH /api/deployments/{endpoint}", json={"max_waiting": 3}),
    **_same("write", "POST /api/deployments/{endpoint}/rollback", json={}, is_let_in=False),
    **_same("write", "POST /api/deployments/{endpoint}/start", is_let_in=False),
    **_same("write", "POST /api/deployments/{endpoint}/stop"),
    **_same("write", "PATCH /api/endpoints/{endpoint}", json={"is_public": False}),
    **_same("key", "GET /api/default-model", is_let_in=False),
    **_same("operator", "PUT /api/default-model", json={"model": "{name}"}, is_let_in=False),
    **_same("operator", "DELETE /api/default-model"),
    **_same("write", "GET /api/uploads"),
    **_same("write", "POST /api/uploads", headers=BEGIN),
    **_same(
        "write",
        "POST /api/uploads/{upload_id}",
        headers=TUS | {"X-HTTP-Method-Override": "HEAD"},
    ),
    **_same("write", "HEAD /api/uploads/{upload_id}", headers=TUS),
    **_same("write", "PATCH /api/uploads/{upload_id}", headers=PIECE, content=b"more"),
    **_same("write", "DELETE /api/uploads/{upload_id}", headers=TUS),
    **_same("admin", "GET /api/keys"),
    **_same("admin", "POST /api/keys", json={"name": "another"}),
    **_same("admin", "DELETE /api/keys/{key_id}"),
    **_same("read", "GET /api/members"),
    **_same("admin", "PATCH /api/members/{user_id}", json={"role": "viewer"}),
    **_same("admin", "DELETE /api/members/{user_id}"),
    **_same("admin", "GET /api/members/invitations"),
    **_same("admin", "POST /api/members/invitations", json={"role": "member"}),
    **_same("admin", "DELETE /api/members/invitations/{invitation_id}"),
}

# --- money ------------------------------------------------------------------------------

RULES |= {
    **_same("read", "GET /api/organization", "GET /api/usage", "GET /api/usage.csv"),
    **_same("operator", "PATCH /api/organization", json={"spending_limit": "5"}),
    **_same("read", "GET /api/budgets", "GET /api/credits", "GET /api/notices"),
    **_same("admin", "PUT /api/budgets", json=BUDGET),
    **_same("admin", "DELETE /api/budgets/{budget_id}"),
    **_same("admin", "GET /api/billing", "GET /api/billing/top-ups/{top_up_id}"),
    **_same("admin", "PUT /api/billing/contact", json={"email": "b@example.com"}),
    **_same("admin", "PUT /api/billing/recharge", json={"below": None, "amount": None}),
    **_same("admin", "POST /api/billing/portal"),
    **_same("admin", "POST /api/billing/top-ups", json={"amount": "25.00"}),
    "POST /api/billing/refunds": Rule(
        needs="operator", json={"top_up_id": "{top_up_id}", "amount": "1.00"}
    ),
    **_same("operator", "GET /api/payments/unfinished"),
    "POST /api/payments/operations/{operation_id}": Rule(
        needs="operator", json={"action": "abandon"}, is_let_in=False
    ),
    **_same("operator", "POST /api/payments/events/{event_id}", is_let_in=False),
    **_same("admin", "POST /api/notices/{notice_id}/dismiss", "GET /api/notices/settings"),
    **_same("admin", "PUT /api/notices/settings", json={"url": ""}),
    **_same("read", "GET /api/invoices", "GET /api/invoices/{invoice_id}"),
    **_same("read", "GET /api/invoices/{invoice_id}/lines/{position}/requests"),
    **_same("operator", "POST /api/invoices/{invoice_id}/paid"),
    **_same("operator", "POST /api/invoices/{invoice_id}/end", json={"state": "void"}),
    **_same("operator", "POST /api/invoices/{invoice_id}/retry", is_let_in=False),
    **_same(
        "operator",
        "POST /api/invoices/clock",
        is_let_in=False,
        json={"now": "2020-01-01T00:00:00Z"},
    ),
    **_same("operator", "GET /api/organizations"),
    **_same("operator", "POST /api/organizations", json={"name": "another"}),
    **_same("operator", "PATCH /api/organizations/{organization_id}", json={"spending_limit": "5"}),
    "POST /api/organizations/{organization_id}/credits": Rule(
        needs="operator", json={"amount_nano": 5}, headers=GIFT
    ),
    **_same("operator", "GET /metrics"),
    **_same("operator", "GET /api/earnings", "GET /api/device-cost"),
    **_same("operator", "PUT /api/device-cost", json={"hour_nano": 5}),
    **_same("key", "GET /api/prices", "GET /api/seals"),
    **_same("operator", "GET /api/prices/history", "GET /api/prices/{book_id}"),
    **_same("operator", "POST /api/prices", "POST /api/prices/preview", json=PRICES),
    **_same("operator", "DELETE /api/prices/{book_id}"),
    **_same("operator", "GET /api/reconciliation", "GET /api/reconciliation/history"),
    **_same("operator", "POST /api/reconciliation"),
    **_same("operator", "POST /api/seals/verify"),
}

# --- the console --------------------------------------------------------------------------

RULES |= {
    "POST /console/sign-out": Rule(needs="read", form={}, is_let_in=False),
    **_same("read", "GET /console/overview"),
    **_same("read", "GET /console/models", "GET /console/models/{name}"),
    **_same("read", "GET /console/models/{name}/versions/{number}"),
    **_same("read", "GET /console/models/{name}/versions/{number}/log"),
    **_same("read", "GET /console/models/{name}/versions/{number}/events", is_let_in=False),
    **_same("write", "GET /console/models/{name}/delete"),
    **_same(
        "write",
        "POST /console/models/{name}/delete",
        form={"confirmation": "{name}"},
        is_let_in=False,
    ),
    **_same("write", "POST /console/models/{name}/endpoint/{verb}", form={}),
    **_same("write", "POST /console/models/{name}/versions/{number}/cancel", form={}),
    **_same("write", "POST /console/models/{name}/versions/{number}/optimise", form={}),
    **_same("write", "POST /console/models/{name}/versions/{number}/optimise/cancel", form={}),
    **_same(
        "write", "POST /console/models/{name}/versions/{number}/rebuild", form={}, is_let_in=False
    ),
    **_same("inference", "GET /console/models/{name}/playground"),
    **_same("inference", "POST /console/models/{name}/playground", form=PLAYGROUND),
    **_same("inference", "POST /console/models/{name}/playground/stream", form=PLAYGROUND),
    **_same("read", "GET /console/models/{name}/playground/runs/{request_id}"),
    **_same("write", "GET /console/upload"),
    **_same("write", "POST /console/upload", form={"name": "x"}, is_let_in=False),
    **_same(
        "write",
        "POST /console/versions",
        form={"name": "x", "upload_id": "{upload_id}"},
        is_let_in=False,
    ),
    **_same("write", "POST /console/uploads", headers=BEGIN),
    **_same("write", "HEAD /console/uploads/{upload_id}", headers=TUS),
    **_same("write", "PATCH /console/uploads/{upload_id}", headers=PIECE, content=b"more"),
    # The API's own DELETE has ended it by then.
    **_same("write", "POST /console/uploads/{upload_id}/discard", form={}, is_let_in=False),
    **_same("write", "DELETE /console/uploads/{upload_id}", headers=TUS, is_let_in=False),
    **_same("admin", "GET /console/keys", "GET /console/keys/{key_id}/revoke"),
    **_same("admin", "GET /console/keys/{key_id}"),
    **_same("admin", "POST /console/keys/{key_id}/limit", form={"limit": "5", "period": "day"}),
    **_same("admin", "POST /console/keys", form={"name": "k", "scope": "read"}),
    **_same("admin", "POST /console/keys/{key_id}/revoke", form={}),
    **_same("read", "GET /console/members", "GET /console/account"),
    **_same("admin", "POST /console/members/invitations", form={"role": "member", "hours": "24"}),
    # The API's own ends these by then, or needs them still.
    **_same(
        "admin",
        "POST /console/members/invitations/{invitation_id}/revoke",
        "POST /console/members/{user_id}/remove",
        form={},
        is_let_in=False,
    ),
    **_same("admin", "POST /console/members/{user_id}/role", form={"role": "viewer"}),
    **_same("admin", "GET /console/members/{user_id}/remove"),
    # Who is alone cannot leave, and there is no other organization to go to.
    **_same("read", "GET /console/account/leave"),
    **_same("read", "POST /console/account/leave", form={}, is_let_in=False),
    **_same(
        "read",
        "POST /console/account/organization",
        form={"organization_id": "{organization_id}"},
        is_let_in=False,
    ),
    **_same("read", "POST /console/account/password", form={}, is_let_in=False),
    **_same("read", "GET /console/usage", "GET /console/usage.csv"),
    **_same("read", "GET /console/requests", "GET /console/requests.csv"),
    **_same("read", "GET /console/receipts/{request_id}"),
    **_same("read", "GET /console/receipts/{request_id}/proof", is_let_in=False),
    **_same("read", "GET /console/billing"),
    **_same(
        "admin",
        "POST /console/billing/budgets",
        form={"of": "key:{key_id}", "period": "day", "limit": "5"},
    ),
    **_same("admin", "POST /console/billing/budgets/{budget_id}/delete", form={}, is_let_in=False),
    **_same("admin", "POST /console/billing/contact", form={"email": "b@example.com"}),
    **_same("operator", "POST /console/billing/limit", form={"spending_limit": "5"}),
    **_same("admin", "POST /console/billing/portal", form={}),
    **_same("admin", "POST /console/billing/recharge", form={}),
    **_same("admin", "POST /console/billing/top-ups", form={"top_up": "25"}),
    **_same("admin", "GET /console/billing/top-ups/{top_up_id}"),
    **_same("admin", "GET /console/billing/top-ups/{top_up_id}/state"),
    **_same("admin", "POST /console/billing/notices", form={"notify_url": ""}),
    **_same("admin", "POST /console/billing/notices/test", form={}),
    **_same("admin", "POST /console/notices/{notice_id}/dismiss", form={}),
    **_same("read", "GET /console/billing/invoices/{invoice_id}"),
    **_same("read", "GET /console/billing/invoices/{invoice_id}/file"),
    **_same("read", "GET /console/billing/invoices/{invoice_id}/lines/{position}"),
    **_same("operator", "GET /console/earnings", "GET /console/earnings.csv"),
    **_same("operator", "POST /console/earnings/device-cost", form={"hour": "2"}),
    **_same("operator", "GET /console/box"),
    **_same("operator", "POST /console/box/default-model", form={"model": "", "note": ""}),
    **_same("operator", "GET /console/books"),
    **_same("operator", "POST /console/books", form={}),
    **_same("operator", "POST /console/books/clock", form={"now": "2026-03-01T12:00Z"}),
    **_same("operator", "GET /console/organizations"),
    **_same("operator", "POST /console/organizations", form={"name": "a third"}),
    **_same("operator", "POST /console/organizations/{organization_id}/owner", form={}),
    **_same("operator", "GET /console/organizations/{organization_id}"),
    "POST /console/organizations/{organization_id}/limit": Rule(
        needs="operator", form={"mode": "limited", "limit": "5"}
    ),
    "POST /console/organizations/{organization_id}/credits": Rule(
        needs="operator", form={"credit": "5", "kind": "promotional", "grant_id": "one"}
    ),
    **_same("operator", "GET /console/prices", "GET /console/prices/edit"),
    **_same("operator", "POST /console/prices/edit", form=PRICE_FORM, is_let_in=False),
    **_same("operator", "GET /console/prices/books/{book_id}"),
    **_same("operator", "GET /console/prices/books/{book_id}/cancel"),
    **_same("operator", "POST /console/prices/books/{book_id}/cancel", form={}),
}
