"""The one currency of a box: amounts of two are never added up.

Owns what is refused where another one would come in.
"""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.tables import AccountBalance, PriceBook
from app.core.errors import Conflict


class WrongCurrency(Conflict):
    """A posting in another currency than its account's."""

    default_code = "wrong_currency"


def require_same(organization_id: str, account_currency: str, currency: str) -> None:
    """Raises `WrongCurrency`."""
    if currency != account_currency:
        raise WrongCurrency(
            f"The account of {organization_id} is kept in {account_currency}: nothing is posted "
            f"to it in {currency}."
        )


async def require_currency(session: AsyncSession, currency: str) -> None:
    """Raises `WrongCurrency` when the newest price book or an account has another one than the
    setting: changed settings change no money."""
    newest = select(PriceBook.currency).order_by(PriceBook.number.desc()).limit(1)
    account = select(AccountBalance.currency).where(AccountBalance.currency != currency).limit(1)
    for what, query in (("prices are", newest), ("accounts are kept", account)):
        found = await session.scalar(query)
        if found is not None and found != currency:
            raise WrongCurrency(
                f"TAPEOUT_CURRENCY is {currency}, but this box's {what} in {found}. "
                f"Set it to {found} again; a box has one currency for good."
            )
