"""The chain of seals: the new ones at once, and all of it again and again, a little in each run."""

from sqlalchemy import Engine

from app.billing.reconciliation.check import Check, Difference, Subject
from app.billing.seal_check import ChainCheck, check_chain
from app.billing.usage_archive import UsageArchive

SEALS = Subject(
    name="seals",
    title="Seals verify",
    description="Every seal is signed, follows the one before, and is the hash of the ledger "
    "transactions and receipts in it, also of those in the archive. New seals at once, older ones "
    "in turn.",
    left_label="Seals looked at",
    right_label="Verified",
    unit="count",
)
NEW_SECONDS = 2.0
OLD_SECONDS = 1.0


class SealWalk:
    """`until` is the last seal that was verified as a new one, `old` where the walk through all
    of them is."""

    def __init__(self, engine: Engine, archive: UsageArchive, public_key: str) -> None:
        self._parts = (engine, archive, public_key)
        self.until = 0
        self.old = 0

    def check(self) -> Check:
        """Each seal in a transaction of its own."""
        new = check_chain(*self._parts, after=self.until, seconds=NEW_SECONDS, looks_for_rest=False)
        self.until = new.last_number
        old = check_chain(*self._parts, after=self.old, seconds=OLD_SECONDS)
        is_through = old.is_complete and old.problem is None
        self.old = 0 if is_through else old.last_number
        found = {d.name: d for part in (new, old) for d in _differences(part)}
        num_seals = new.num_seals + old.num_seals + len(found)
        note = (
            f"{new.num_seals:,} new and {old.num_seals:,} older ones, with "
            f"{new.num_transactions + old.num_transactions:,} transactions and "
            f"{new.num_receipts + old.num_receipts:,} receipts. "
            + ("All of the chain has been walked through." if is_through else "")
        ).strip()
        return SEALS.compared(num_seals, num_seals - len(found), found.values(), note=note)


def _differences(part: ChainCheck) -> list[Difference]:
    if part.problem is None:
        return []
    return [Difference(f"after seal {part.last_number}", 1, 0, part.problem)]
