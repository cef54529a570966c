"""What a request is told when no money can be set aside for it. Decides nothing."""

from app.billing.budget_holds import BudgetRefusal
from app.billing.holds import HoldRequest, Refusal, Standing
from app.billing.tables import MAX_BALANCE_NANO, MAX_HOLD_NANO
from app.core.errors import PaymentRequired, Unavailable
from app.core.money import format_nano


def refusal_of(hold: HoldRequest, refusal: Refusal) -> PaymentRequired:
    """Names the limit and the shortfall, or the bound of every account."""
    if isinstance(refusal, BudgetRefusal):
        return _over_budget(hold, refusal)
    if refusal.credit_limit_nano is None or refusal.room_nano < hold.amount_nano:
        return _account_full(hold, refusal)
    return _short_of_money(hold, refusal, refusal.credit_limit_nano)


def _short_of_money(hold: HoldRequest, standing: Standing, limit_nano: int) -> PaymentRequired:
    def shown(nano: int) -> str:
        return format_nano(nano, standing.currency, places=9)

    is_prepaid = limit_nano == 0
    limit = "prepaid balance" if is_prepaid else f"spending limit of {shown(limit_nano)}"
    remedy = "Top the balance up" if is_prepaid else "Raise the limit"
    return PaymentRequired(
        f"The organization's {limit} does not cover this request: it may "
        f"cost up to {shown(hold.amount_nano)}, {shown(standing.available_nano)} is left "
        f"({shown(standing.held_nano)} is held for running requests), so "
        f"{shown(hold.amount_nano - standing.available_nano)} is missing. {remedy}, or ask for "
        "fewer tokens.",
        code="balance_too_low" if is_prepaid else None,
    )


def _over_budget(hold: HoldRequest, budget: BudgetRefusal) -> PaymentRequired:
    def shown(nano: int) -> str:
        return format_nano(nano, budget.currency, places=9)

    of = {
        "organization": "the organization",
        "key": f"the key {budget.name!r}",
        "model": f"the model {budget.name!r}",
    }[budget.scope]
    period = {"day": "daily", "month": "monthly"}[budget.period]
    begins = {"day": "The next day begins", "month": "The next month begins"}[budget.period]
    return PaymentRequired(
        f"The {period} budget of {of}, {shown(budget.limit_nano)}, does not cover this request: "
        f"it may cost up to {shown(hold.amount_nano)}, {shown(budget.left_nano)} is left "
        f"({shown(budget.posted_nano)} is spent since {budget.starts_on}, "
        f"{shown(budget.held_nano)} is held for running requests), so "
        f"{shown(hold.amount_nano - budget.left_nano)} is missing. {begins} at midnight UTC; "
        "raise the budget, or ask for fewer tokens.",
        code="budget_reached",
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
