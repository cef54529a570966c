"""What is held for running requests: by accounts and by budgets' windows, against the holds."""

from collections import defaultdict

from sqlalchemy import Connection, text

from app.billing.reconciliation.check import Check, Subject, differing

HOLDS = Subject(
    name="holds",
    title="Held = holds",
    description="What balances say is set aside for running requests against those requests' "
    "holds.",
    left_label="Held by balances",
    right_label="Sum of holds",
)
WINDOWS = Subject(
    name="windows",
    title="Held in budgets = holds in budgets",
    description="What each budget's day or month says is set aside against the holds counted in "
    "it.",
    left_label="Held by budgets",
    right_label="Sum of holds in budgets",
)


def check_holds(connection: Connection) -> Check:
    rows = connection.execute(
        text("SELECT organization_id, held_nano FROM account_balance WHERE held_nano <> 0")
    )
    held = {organization_id: int(nano) for organization_id, nano in rows}
    rows = connection.execute(
        text("SELECT organization_id, sum(amount_nano) FROM hold GROUP BY organization_id")
    )
    holds = {organization_id: int(nano) for organization_id, nano in rows}
    return HOLDS.compared(sum(held.values()), sum(holds.values()), differing(held, holds))


def check_windows(connection: Connection) -> Check:
    """A hold counted in a window must be a hold as well, and for the same amount."""
    held: dict[str, int] = defaultdict(int)
    for budget_id, starts_on, nano in connection.execute(
        text("SELECT budget_id, starts_on, held_nano FROM budget_window WHERE held_nano <> 0")
    ):
        held[f"{budget_id} {starts_on}"] = int(nano)
    holds: dict[str, int] = defaultdict(int)
    for budget_id, starts_on, nano in connection.execute(
        text(
            "SELECT w.budget_id, w.starts_on, sum(coalesce(h.amount_nano, 0)) FROM hold_window w"
            " LEFT JOIN hold h ON h.request_id = w.request_id AND h.amount_nano = w.amount_nano"
            " GROUP BY w.budget_id, w.starts_on"
        )
    ):
        holds[f"{budget_id} {starts_on}"] = int(nano)
    return WINDOWS.compared(sum(held.values()), sum(holds.values()), differing(held, holds))
