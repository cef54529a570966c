"""What the books should say, in plain Python: written from the rules, not from the code.

Knows no SQL and none of the application's modules. Amounts are nano-units.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction


@dataclass
class Lot:
    id: str
    kind: str
    remaining: int
    priority: int
    expires_at: datetime | None
    made: tuple[datetime, int]

    @property
    def order(self) -> tuple[object, ...]:
        """Priority, then what ends first, then what is older."""
        ends = (1, self.made[0]) if self.expires_at is None else (0, self.expires_at)
        return (self.priority, *ends, self.made)

    def is_over(self, at: datetime) -> bool:
        return self.expires_at is not None and self.expires_at <= at


@dataclass
class Window:
    """One day or month of one budget."""

    posted: int = 0
    held: int = 0


@dataclass
class Budget:
    id: str
    scope: str
    subject: str
    period: str
    limit: int
    windows: dict[str, Window] = field(default_factory=lambda: defaultdict(Window))

    def starts_on(self, at: datetime) -> str:
        return f"{at:%Y-%m-%d}" if self.period == "day" else f"{at:%Y-%m-01}"

    def concerns(self, key: str, endpoint: str) -> bool:
        return self.scope == "organization" or self.subject in (key, endpoint)


@dataclass
class Hold:
    amount: int
    windows: list[Window]


@dataclass
class Account:
    """One organization's money."""

    limit: int | None = None
    on_account: int = 0
    forced: int = 0
    lots: dict[str, Lot] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    settling: int = 0  # held until just now by what is settled
    budgets: dict[str, Budget] = field(default_factory=dict)
    windows: dict[tuple[str, str], Window] = field(default_factory=dict)  # of deleted ones too
    billed: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # by month

    @property
    def in_lots(self) -> int:
        return sum(lot.remaining for lot in self.lots.values())

    @property
    def posted(self) -> int:
        return self.on_account + self.in_lots

    @property
    def held(self) -> int:
        return sum(hold.amount for hold in self.holds.values())

    def left_over(self, at: datetime) -> int:
        """Of credit whose time is over, and which nobody has taken away yet."""
        return sum(lot.remaining for lot in self.lots.values() if lot.is_over(at))

    def promised(self, held: int) -> int:
        """Of credit to requests that hold this: what the limit does not cover beside the debt."""
        if self.limit is None:
            return 0
        return min(held, max(0, held - self.on_account - self.limit))

    def lacking(self, limit: int | None) -> int:
        return 0 if limit is None or not self.held else max(0, self.held - self.posted - limit)

    # --- requests -------------------------------------------------------------------------

    def hold(self, name: str, amount: int, key: str, endpoint: str, at: datetime) -> str:
        """Why it is refused, or nothing."""
        concerned = [b for b in self.budgets.values() if b.concerns(key, endpoint)]
        for budget in concerned:
            window = budget.windows[budget.starts_on(at)]
            if budget.limit - window.posted - window.held < amount and amount > 0:
                return "budget"
        available = self.posted - self.left_over(at) - self.held
        if self.limit is not None and available - amount < -self.limit:
            return "limit"
        windows = []
        for budget in concerned:
            window = budget.windows[budget.starts_on(at)]
            window.held += amount
            windows.append(window)
            self.windows[budget.id, budget.starts_on(at)] = window
        self.holds[name] = Hold(amount, windows)
        return ""

    def free(self, name: str, spent: int = 0) -> None:
        hold = self.holds.pop(name, None)
        self.settling += hold.amount if hold else 0
        for window in hold.windows if hold else []:
            window.held -= hold.amount if hold else 0
            window.posted += spent

    def calm(self) -> None:
        """After what was freed and spent together: no more is forced than is still lacking."""
        self.forced = min(self.forced, self.lacking(self.limit))
        self.settling = 0

    def use(self, amount: int, at: datetime) -> None:
        """Takes from credit in order, and the rest on account. Of credit whose time is over as
        much as if it had been taken away at its instant: what was promised under a limit, and
        nothing else covers."""
        self.billed[f"{at:%Y-%m}"] += amount
        promised = self.promised(self.held + self.settling)
        over = max(0, promised - (self.in_lots - self.left_over(at)))
        for lot in sorted(self.lots.values(), key=lambda lot: lot.order):
            taken = min(lot.remaining, amount, over if lot.is_over(at) else amount)
            over -= taken if lot.is_over(at) else 0
            lot.remaining -= taken
            amount -= taken
        self.on_account -= amount

    # --- people ---------------------------------------------------------------------------

    def add(self, lot: Lot, amount: int) -> None:
        """A prepaid account pays what it owes first."""
        owed = 0
        if self.limit == 0 and lot.kind == "paid":
            owed = min(amount, max(0, -self.on_account))
        self.on_account += owed
        lot.remaining = amount - owed
        self.lots[lot.id] = lot
        self.forced = self.lacking(self.limit)

    def take_back(self, lot_id: str, amount: int) -> None:
        lot = self.lots[lot_id]
        from_lot = min(lot.remaining, amount)
        lot.remaining -= from_lot
        self.on_account -= amount - from_lot
        self.forced = self.lacking(self.limit)

    def expire(self, lot_id: str) -> None:
        """All but what running requests were promised."""
        lot = self.lots[lot_id]
        amount = min(lot.remaining, max(0, self.in_lots - self.promised(self.held)))
        lot.remaining -= amount
        if amount:
            self.forced = self.lacking(self.limit)

    def set_limit(self, limit: int | None) -> bool:
        """Whether it is possible while requests run."""
        if self.lacking(limit) > self.forced:
            return False
        self.limit = limit
        self.forced = min(self.forced, self.lacking(limit))
        return True


def line(quantity: int, price: int, scale: int) -> int:
    """Half to even, once."""
    return round(Fraction(quantity * price, scale))
