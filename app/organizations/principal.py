"""Who is calling: the answer of every kind of authentication, and what it may do."""

from datetime import datetime
from typing import Literal, get_args

import msgspec

from app.core.errors import Forbidden

Scope = Literal["inference", "read", "write", "admin"]
Role = Literal["owner", "admin", "member", "viewer"]

SCOPES: frozenset[str] = frozenset(get_args(Scope))

# What a scope allows, in the words shown to people.
SCOPE_MEANINGS: dict[str, str] = {
    "inference": "call endpoints",
    "read": "list models, usage and receipts",
    "write": "upload, deploy and delete models",
    "admin": "manage keys, prices and limits",
}

SCOPES_BY_ROLE: dict[str, frozenset[str]] = {
    "owner": SCOPES,
    "admin": SCOPES,
    "member": SCOPES - {"admin"},
    "viewer": frozenset({"read"}),
}

# What a role is, in the words shown to people.
ROLE_MEANINGS: dict[str, str] = {
    "owner": "everything, also who else is an owner",
    "admin": "everything but making or removing owners",
    "member": "upload, deploy and call models, see usage and bills",
    "viewer": "only look: models, usage and bills",
}


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """A caller, on behalf of one organization. `api_key_id` is empty for a person in the
    console; `user_id` and `role` are None and `sign_in_id` is empty for an API key, and only a key
    has an `expires_at`."""

    organization_id: str
    organization_name: str
    cache_salt: bytes
    is_operator: bool
    scopes: frozenset[str]
    api_key_id: str = ""
    api_key_name: str = "console"
    user_id: str | None = None
    role: str | None = None
    sign_in_id: str = ""
    expires_at: datetime | None = None

    def require(self, scope: Scope) -> None:
        """Raises `Forbidden`, naming the scope, unless this caller has it."""
        if scope not in self.scopes:
            holder = "Your role" if self.user_id else "This API key"
            raise Forbidden(
                f"{holder} may not {SCOPE_MEANINGS[scope]}: it lacks the scope {scope!r}.",
                code="missing_scope",
            )

    def require_operator(self) -> None:
        """Raises `Forbidden` unless this caller administers the box itself."""
        self.require("admin")
        if not self.is_operator:
            raise Forbidden(
                "Only the organization that operates this box may do this.", code="operator_only"
            )
