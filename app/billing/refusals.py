"""What a request is told when no money can be set aside for it. Decides nothing."""

from app.billing.posting import HoldRequest, Standing
from app.billing.tables import MAX_BALANCE_NANO, MAX_HOLD_NANO
from app.core.errors import PaymentRequired, Unavailable
from app.core.money import format_nano


def payment_required(hold: HoldRequest, standing: Standing) -> PaymentRequired:
    """Names the limit and the shortfall, or the bound of every account."""
    if standing.credit_limit_nano is None or standing.room_nano < hold.amount_nano:
        return _account_full(hold, standing)
    limit = standing.credit_limit_nano or 0
    shortfall = hold.amount_nano - standing.available_nano

    def shown(nano: int) -> str:
        return format_nano(nano, standing.currency, places=9)

    return PaymentRequired(
        f"The organization's spending limit of {shown(limit)} does not cover this request: it may "
        f"cost up to {shown(hold.amount_nano)}, {shown(standing.available_nano)} is left "
        f"({shown(standing.held_nano)} is held for running requests), so "
        f"{shown(shortfall)} is missing. Raise the limit, or ask for fewer tokens."
    )


def _account_full(hold: HoldRequest, standing: Standing) -> PaymentRequired:
    def shown(nano: int) -> str:
        return format_nano(nano, standing.currency, places=2)

    return PaymentRequired(
        f"This request may cost up to {shown(hold.amount_nano)}. With what the organization owes "
        f"({shown(-standing.posted_nano)}) and what is held for running requests "
        f"({shown(standing.held_nano)}) that is more than the {shown(MAX_BALANCE_NANO)} that an "
        "account can keep count of. Wait for running requests to end, or have the operator look "
        "at the prices.",
        code="account_full",
    )


def request_too_dear(amount_nano: int, currency: str) -> PaymentRequired:
    return PaymentRequired(
        f"This request may cost up to {format_nano(amount_nano, currency, places=2)}; no request "
        f"may cost more than {format_nano(MAX_HOLD_NANO, currency, places=2)}. Ask for fewer "
        "tokens, or have the operator look at the prices.",
        code="request_too_dear",
    )


def accounts_unavailable() -> Unavailable:
    return Unavailable(
        "The box cannot reserve the money for this request at the moment.",
        code="accounts_unavailable",
        retry_after_seconds=5,
    )
