"""Errors as Stripe's API returns them."""

from typing import Any

Object = dict[str, Any]


class ApiError(Exception):
    """An answer other than 200. `is_saved` = kept under the idempotency key, as all answers are
    whose execution began."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str = "",
        param: str = "",
        decline_code: str = "",
        payment_intent: Object | None = None,
        headers: dict[str, str] | None = None,
        is_saved: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.is_saved = is_saved
        body: Object = {"message": message, "type": type}
        for name, value in (("code", code), ("param", param), ("decline_code", decline_code)):
            if value:
                body[name] = value
        if payment_intent is not None:
            body["payment_intent"] = payment_intent
        self.body: Object = {"error": body}


def invalid(message: str, param: str = "", code: str = "") -> ApiError:
    """Parameters that no execution began with."""
    return ApiError(400, message, code=code, param=param, is_saved=False)


def missing(kind: str, id: str, param: str = "id") -> ApiError:
    name = kind.replace(".", " ")
    return ApiError(404, f"No such {name}: '{id}'", code="resource_missing", param=param)


def refused(message: str, code: str = "") -> ApiError:
    """Valid parameters that the object's state does not allow."""
    return ApiError(400, message, code=code)


def fault() -> ApiError:
    message = "An unknown error occurred"
    return ApiError(500, message, type="api_error", headers={"Stripe-Should-Retry": "false"})


def in_use() -> ApiError:
    return ApiError(
        409,
        "There is currently another in-progress request using this idempotent key.",
        type="idempotency_error",
        code="idempotency_key_in_use",
        is_saved=False,
    )
