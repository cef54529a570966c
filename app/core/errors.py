"""The errors a caller can see. Every one says what happened and, where it can, what to do.

`app/api/errors.py` and `app/console/errors.py` render them; nothing else turns an exception
into a response.
"""

from typing import ClassVar


class AppError(Exception):
    """`status` is the HTTP status, `type` OpenAI's error type, `code` a word for programs."""

    status: int = 500
    type: str = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(AppError):
    status, type, default_code = 400, "invalid_request_error", "invalid_value"


class Unstorable(InvalidRequest):
    """Something in the request is no value that the database knows."""

    def __init__(self) -> None:
        super().__init__(
            "The request holds a number that is out of range, or text with a NUL character."
        )


class Unauthenticated(AppError):
    status, type, default_code = 401, "authentication_error", "invalid_api_key"


class PaymentRequired(AppError):
    status, type, default_code = 402, "insufficient_quota", "spending_limit_reached"


class Forbidden(AppError):
    status, type, default_code = 403, "permission_error", "forbidden"


class NotFound(AppError):
    status, type, default_code = 404, "invalid_request_error", "not_found"


class TookTooLong(AppError):
    """The body did not arrive within the time that a request has for it."""

    status, type, default_code = 408, "invalid_request_error", "request_timeout"


class Conflict(AppError):
    status, type, default_code = 409, "invalid_request_error", "conflict"


class TooLarge(AppError):
    status, type, default_code = 413, "invalid_request_error", "too_large"


class UnsupportedMediaType(AppError):
    """The body is of a kind that this route does not read."""

    status, type, default_code = 415, "invalid_request_error", "unsupported_media_type"


class NotImplementedHere(AppError):
    """Part of a protocol that this box speaks, but not that part."""

    status, type, default_code = 501, "invalid_request_error", "not_implemented"


class Unprocessable(AppError):
    """Understood, but cannot be served: a refused model."""

    status, type, default_code = 422, "invalid_request_error", "refused"


class RateLimited(AppError):
    status, type, default_code = 429, "rate_limit_error", "rate_limited"


class Unavailable(AppError):
    status, type, default_code = 503, "server_error", "unavailable"


class StorageFull(AppError):
    status, type, default_code = 507, "server_error", "storage_full"


class RuntimeFailure(AppError):
    """A typed failure that a worker or build reported; its status and type are the worker's."""

    def __init__(
        self, message: str, *, status: int, type: str, code: str, param: str | None
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status  # type: ignore[misc]
        self.type = type  # type: ignore[misc]
