"""What may come of asking Stripe for something, said by what the caller must do next.

Each speaks of the one call that raised it: a `StripeBusy` after an earlier call that came out
as `StripeUnknown` does not undo the doubt about that earlier one.
"""


class StripeError(Exception):
    """Stripe did not do what was asked, or did not say that it did."""


class StripeUnknown(StripeError):
    """No answer, a broken connection or a fault of Stripe's (5xx): it may have happened. Ask again
    with the same key within 24 hours, afterwards look for the object by our metadata. With
    `is_saved`, Stripe keeps the fault under the key and will only ever repeat it: look at once."""

    def __init__(self, message: str, *, is_saved: bool = False) -> None:
        super().__init__(message)
        self.is_saved = is_saved


class StripeBusy(StripeError):
    """Too many requests, or locked by another: it did not happen; ask again, same key, later."""

    def __init__(self, message: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class StripeUnreachable(StripeBusy):
    """No connection could be made, so it did not happen: Stripe or our network is down."""


class StripeUnauthorized(StripeBusy):
    """The API key is wrong or may not do this. It did not happen, and will once the operator has
    set the right key."""


class StripeRejected(StripeError):
    """It did not happen and repeating will not help: a declined card, a wrong parameter, an object
    that is not there (`code` resource_missing) or not in the state that this needs."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        param: str = "",
        decline_code: str = "",
        payment_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code  # card_declined, authentication_required, resource_missing ...
        self.param = param
        self.decline_code = decline_code  # insufficient_funds, expired_card ...
        self.payment_id = payment_id  # of the payment that was declined


class StripeKeyReused(StripeError):
    """The idempotency key was used before with other parameters: a fault in our own books, for a
    person to look at. This call did nothing; the one before may have."""


class BadSignature(Exception):
    """A webhook that does not prove that Stripe sent it just now. The message says what to do."""
