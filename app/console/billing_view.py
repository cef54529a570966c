"""What the page Billing shows: what there is and is owed, how it is paid, and what is allowed."""

from collections.abc import Sequence

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.openai import visible_models
from app.billing.budgets import BudgetView, list_budgets
from app.billing.credits import open_lots
from app.billing.payments.cents import NANO_PER_CENT
from app.billing.payments.invoice_view import InvoicePage, read_invoices
from app.billing.payments.notices import all_notices
from app.billing.payments.profile import read_profile
from app.billing.payments.tables import BillingProfile, Notice, TopUp
from app.billing.payments.top_ups import list_top_ups
from app.billing.service import Account, read_account
from app.billing.tables import CreditLot
from app.console.lamps import Lamp
from app.core.money import write_amount
from app.organizations.keys import list_keys
from app.organizations.principal import Principal

NUM_TOP_UPS = 20
NUM_NOTICES = 8
PAGE_INVOICES = 12
PRESETS = ("10.00", "25.00", "100.00")
TOP_UP_LAMPS = {
    "created": Lamp("busy", "being prepared"),
    "pending": Lamp("busy", "waiting for payment"),
    "paid": Lamp("good", "paid"),
    "failed": Lamp("bad", "failed"),
    "expired": Lamp("", "not paid in time"),
    "refunded": Lamp("", "refunded"),
    "disputed": Lamp("bad", "disputed"),
}
INVOICE_LAMPS = {
    "frozen": Lamp("busy", "being sent"),
    "pushed": Lamp("busy", "being sent"),
    "finalised": Lamp("busy", "to be paid"),
    "paid": Lamp("good", "paid"),
    "past_due": Lamp("bad", "past due"),
    "uncollectible": Lamp("bad", "given up"),
    "void": Lamp("", "void"),
    "differs": Lamp("bad", "being checked"),
    "settled": Lamp("good", "nothing to pay"),
}


class Subjects(msgspec.Struct, frozen=True):
    """What a budget may be of: (id, name) of keys, and names of models."""

    keys: list[tuple[str, str]]
    models: list[str]


class BillingView(msgspec.Struct, frozen=True, kw_only=True):
    """`lots` are in the order of use."""

    account: Account
    lots: Sequence[CreditLot]
    top_ups: Sequence[TopUp]
    invoices: InvoicePage
    budgets: list[BudgetView]
    subjects: Subjects
    profile: BillingProfile
    notices: Sequence[Notice]
    takes_payments: bool

    @property
    def currency(self) -> str:
        return self.account.currency

    @property
    def balance_nano(self) -> int:
        return -self.account.owed_nano

    @property
    def paid_nano(self) -> int:
        return sum(lot.remaining_nano for lot in self.lots if lot.kind == "paid")

    @property
    def promotional_nano(self) -> int:
        return sum(lot.remaining_nano for lot in self.lots if lot.kind == "promotional")

    @property
    def on_account_nano(self) -> int:
        """Beside the credit: owed where negative, else paid beyond what was owed."""
        return self.balance_nano - self.paid_nano - self.promotional_nano

    @property
    def limit_nano(self) -> int | None:
        return self.account.spending_limit_nano

    @property
    def is_prepaid(self) -> bool:
        return self.limit_nano == 0

    @property
    def available_nano(self) -> int | None:
        """What new requests may reserve; None without limit."""
        if self.limit_nano is None:
            return None
        return max(0, self.balance_nano - self.account.held_nano + self.limit_nano)

    @property
    def card(self) -> str:
        return self.profile.card_label or ("A card" if self.profile.payment_method_id else "")

    @property
    def low_balance(self) -> str:
        nano = self.profile.low_balance_nano
        return "" if nano is None else write_amount(nano)

    @property
    def recharge_below(self) -> str:
        below = self.profile.recharge_below_nano
        return "" if below is None else write_amount(below)

    @property
    def recharge_amount(self) -> str:
        cents = self.profile.recharge_cents
        return "" if cents is None else write_amount(cents * NANO_PER_CENT)

    def first_expiry(self, kind: str) -> CreditLot | None:
        """The lot of this kind that ends first."""
        ending = [lot for lot in self.lots if lot.kind == kind and lot.expires_at is not None]
        return min(ending, key=lambda lot: (lot.expires_at, lot.id), default=None)


async def read_billing(
    session: AsyncSession,
    principal: Principal,
    currency: str,
    *,
    takes_payments: bool,
    invoices_after: str = "",
) -> BillingView:
    """`invoices_after` is where the page of invoices before ended."""
    organization_id = principal.organization_id
    return BillingView(
        account=await read_account(session, organization_id, currency),
        lots=await open_lots(session, organization_id),
        top_ups=await list_top_ups(session, organization_id, NUM_TOP_UPS),
        invoices=await read_invoices(session, organization_id, invoices_after, PAGE_INVOICES),
        budgets=await list_budgets(session, organization_id),
        subjects=await _subjects(session, principal),
        profile=await read_profile(session, organization_id),
        notices=(await all_notices(session, organization_id))[:NUM_NOTICES],
        takes_payments=takes_payments,
    )


async def _subjects(session: AsyncSession, principal: Principal) -> Subjects:
    keys = await list_keys(session, principal.organization_id)
    models = await visible_models(session, principal)
    return Subjects(
        [(key.id, key.name) for key in keys if key.revoked_at is None],
        [model.id for model in models],
    )
