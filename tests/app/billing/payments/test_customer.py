"""The customer at Stripe and its e-mail address, where Stripe refuses to change it."""

from app.billing.ledger import lock_account
from app.billing.payments.profile import set_email
from tests.app.billing.payments.cashier import Cashier


async def change_email(cashier: Cashier, email: str) -> None:
    async with cashier.database.write() as session:
        await lock_account(session, cashier.organization_id, "usd")
        await set_email(session, cashier.organization_id, email)
    await cashier.work_until_idle(rounds=2)


def email_at_stripe(cashier: Cashier) -> str:
    (customer,) = cashier.stripe.account.all("customer")
    return customer["email"]


async def test_an_address_that_stripe_refuses_is_told_of(cashier: Cashier) -> None:
    await cashier.pay()
    await change_email(cashier, "first@example.com")
    assert email_at_stripe(cashier) == "first@example.com"
    assert await cashier.notices("email_refused") == []

    cashier.stripe.faults.add("reject", "customers/")
    await change_email(cashier, "second@example.com")
    (notice,) = await cashier.notices("email_refused")
    assert notice.organization_id == cashier.organization_id
    assert notice.data == {"email": "second@example.com"}
    assert "'second@example.com' but to the address before" in notice.message
    assert "A rule of Stripe's forbids this." in notice.message
    assert notice.ended_at is None
    assert email_at_stripe(cashier) == "first@example.com"

    await change_email(cashier, "third@example.com")
    assert email_at_stripe(cashier) == "third@example.com"
    (notice,) = await cashier.notices("email_refused")
    assert notice.ended_at is not None


async def test_a_customer_that_is_gone_is_made_again_with_the_address(cashier: Cashier) -> None:
    """Also where its deletion was not heard of."""
    await cashier.save_card()
    (customer,) = cashier.stripe.account.all("customer")
    customer["deleted"] = True
    await change_email(cashier, "new@example.com")
    assert await cashier.notices("email_refused") == []
    profile = await cashier.profile()
    assert (profile.stripe_customer_id, profile.payment_method_id) == (None, None)
    await cashier.begin()
    await cashier.work_until_idle(rounds=2)
    made = (await cashier.profile()).stripe_customer_id
    assert made not in (None, customer["id"])
    emails = {each["id"]: each["email"] for each in cashier.stripe.account.all("customer")}
    assert emails[made] == "new@example.com"
