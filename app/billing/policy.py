"""Which outcomes are charged, as data of a price book.

A policy maps an outcome, or `outcome.dimension`, to `billed` or `waived`. What it leaves out
follows `DEFAULTS`. What is waived is recorded with its quantity and price, and costs nothing.
"""

from collections.abc import Mapping
from typing import get_args

from app.core.errors import InvalidRequest
from app.metering.records import Outcome
from app.metering.tables import DIMENSIONS

Policy = Mapping[str, str]

BILLED, WAIVED = "billed", "waived"
OUTCOMES: tuple[str, ...] = get_args(Outcome)
# Work that was asked for is paid for, also by a client that left; our faults and unknowns are not.
DEFAULTS: dict[str, str] = {
    "completed": BILLED,
    "cancelled": BILLED,
    "failed": WAIVED,
    "lost": WAIVED,
}


def disposition(policy: Policy, outcome: str, dimension: str) -> str:
    """`billed` or `waived`: by outcome and dimension, else by outcome, else as by default."""
    found = policy.get(f"{outcome}.{dimension}") or policy.get(outcome)
    return found or DEFAULTS.get(outcome, WAIVED)


def check_policy(policy: Policy) -> None:
    """Raises `InvalidRequest` naming the first rule that means nothing or gives all away."""
    for key, value in policy.items():
        outcome, dot, dimension = key.partition(".")
        if outcome not in OUTCOMES or (dot and dimension not in DIMENSIONS):
            raise InvalidRequest(
                f"policy: {key!r} is not an outcome ({', '.join(OUTCOMES)}), alone or with a "
                f"dimension ({', '.join(DIMENSIONS)}), such as cancelled.output.",
                param="policy",
            )
        if value not in (BILLED, WAIVED):
            raise InvalidRequest(
                f"policy[{key!r}] must be {BILLED} or {WAIVED}.", param=f"policy.{key}"
            )
    if policy.get("completed") == WAIVED:
        raise InvalidRequest(
            "policy: completed requests cannot be waived as a whole. To give something away, "
            "set its price to zero or name a dimension, such as completed.request.",
            param="policy.completed",
        )


def without_defaults(policy: Policy) -> dict[str, str]:
    """The same policy in one form, so that equal policies have equal fingerprints."""
    return {
        key: value
        for key, value in sorted(policy.items())
        if "." in key or value != DEFAULTS.get(key)
    }
