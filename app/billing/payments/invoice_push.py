"""The way of an invoice to Stripe: a draft, our lines on it, a comparison, and only then its
finalising.

Owns what is done at Stripe and when; that it is done once is the outbox's. Nothing is finalised
whose total and lines, read again, are not ours: it stays a draft, and a person is told.
"""

from typing import Any

import msgspec
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import lock_account
from app.billing.payments.cents import require_cents
from app.billing.payments.invoice_books import apply, set_aside
from app.billing.payments.invoice_lines import stripe_lines
from app.billing.payments.invoice_payments import advance
from app.billing.payments.invoices import release
from app.billing.payments.notices import end, notify
from app.billing.payments.operations import Answer, Kind, NotNeeded, Operation, Refusal, plan
from app.billing.payments.profile import need_customer, read_profile
from app.billing.payments.tables import BillingProfile, Invoice, InvoiceLine
from app.billing.stripe import Stripe
from app.billing.stripe_errors import StripeRejected
from app.billing.stripe_objects import Invoice as StripeInvoice
from app.billing.stripe_objects import LineParams
from app.core.database import Database
from app.core.errors import Conflict
from app.core.failpoints import failpoint
from app.core.ids import new_id
from app.organizations.tables import Organization

LINES_PER_CALL = 100
DIFFERS = "differs"  # the code of a refusal that is our own


async def push_invoices(database: Database, *, has_stripe: bool) -> int:
    """Plans what frozen invoices need to get to Stripe, where their organization can be reached by
    it. Without Stripe they are ready as they are. Returns how many moved."""
    if not has_stripe:
        async with database.write() as session:
            ready = await session.scalars(
                update(Invoice)
                .where(Invoice.state == "frozen", Invoice.stripe_invoice_id.is_(None))
                .values(state="finalised")
                .returning(Invoice.id)
            )
            return len(ready.all())
    async with database.read() as session:
        rows = await session.execute(
            select(Invoice.id, Invoice.organization_id, Invoice.currency)
            .where(
                Invoice.state == "frozen",
                Invoice.stripe_invoice_id.is_(None),
                Invoice.error == "",
            )
            .order_by(Invoice.number)
        )
        waiting = rows.all()
    num_planned = 0
    for invoice_id, organization_id, currency in waiting:
        async with database.write() as session:
            await lock_account(session, organization_id, currency)
            num_planned += await _plan(session, invoice_id)
            failpoint("invoice_push.before_plan_commit")
    return num_planned


async def _plan(session: AsyncSession, invoice_id: str) -> bool:
    invoice = await _locked(session, invoice_id)
    if invoice.state != "frozen":
        return False
    try:
        require_cents(invoice.currency)
    except Conflict as error:
        await set_aside(session, invoice, error.message, is_gone=False)
        return False
    profile = await read_profile(session, invoice.organization_id)
    if not (profile.email or profile.payment_method_id):
        await _ask_for_address(session, invoice)
        return False
    await end(session, invoice.organization_id, "invoice_address")
    await plan(
        session,
        CreateInvoice.name,
        f"invoice:{invoice.id}",
        invoice.organization_id,
        invoice.id,
        {},
    )
    return True


async def _ask_for_address(session: AsyncSession, invoice: Invoice) -> None:
    """The operator need not send invoices to itself."""
    organization = await session.get(Organization, invoice.organization_id)
    if organization is not None and organization.is_operator:
        return
    await notify(
        session,
        invoice.organization_id,
        "invoice_address",
        "Enter an e-mail address for bills, or save a card: your invoice cannot be sent without.",
        {"invoice_id": invoice.id},
    )


async def retry(session: AsyncSession, invoice: Invoice) -> None:
    """Brings an invoice that was held back on its way again, after a person has looked at it. The
    account is locked, and its lines are right: `invoices.py` sees to those that are not."""
    key = new_id("try")
    await release(session, invoice)
    if invoice.stripe_invoice_id is None:
        kind, params = CreateInvoice.name, dict[str, Any]()
    else:
        kind, params = AddLines.name, await _line_params(session, invoice)
    await plan(
        session, kind, f"{kind}:{invoice.id}:{key}", invoice.organization_id, invoice.id, params
    )


class CreateInvoice(Kind):
    """An empty draft. A second one would stay an empty draft, which nobody is sent."""

    name = "create_invoice"
    is_harmless_twice = True

    async def prepare(self, session: AsyncSession, operation: Operation) -> dict[str, Any] | None:
        invoice = await _locked(session, operation.subject_id)
        if invoice.state != "frozen" or invoice.stripe_invoice_id is not None:
            raise NotNeeded(f"The invoice is {invoice.state}.")
        customer_id = await need_customer(session, invoice.organization_id)
        if customer_id is None:
            return None
        profile = await session.get_one(BillingProfile, invoice.organization_id)
        return {
            "customer_id": customer_id,
            "currency": invoice.currency,
            "invoice_id": invoice.id,
            "description": f"Usage in {invoice.period}, invoice {invoice.number} of this service",
            "is_automatic": profile.payment_method_id is not None,
            "payment_method_id": profile.payment_method_id or "",
        }

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        return stripe.create_invoice(operation.id, **operation.params)

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        params = operation.params
        return stripe.find_invoice(
            params["invoice_id"], operation.searched_from, params["customer_id"]
        )

    async def confirmed(
        self, session: AsyncSession, operation: Operation, answer: StripeInvoice
    ) -> None:
        invoice = await _locked(session, operation.subject_id)
        if invoice.stripe_invoice_id not in (
            None,
            answer.id,
        ):  # an operation that was long in doubt
            await _plan_deletion(session, invoice, answer.id)
            return
        if invoice.state != "frozen":
            return  # ended otherwise meanwhile; the empty draft at Stripe asks for nothing
        invoice.stripe_invoice_id = answer.id
        await plan(
            session,
            AddLines.name,
            f"invoice_lines:{operation.id}",  # of this draft
            invoice.organization_id,
            invoice.id,
            await _line_params(session, invoice),
        )

    async def refused(self, session: AsyncSession, operation: Operation, why: Refusal) -> None:
        await _set_aside(session, operation, why)

    async def doubted(self, session: AsyncSession, operation: Operation, reason: str) -> None:
        await _set_aside(session, operation, Refusal(reason))


async def _plan_deletion(session: AsyncSession, invoice: Invoice, stripe_invoice_id: str) -> None:
    await plan(
        session,
        DeleteDraft.name,
        f"delete_draft:{stripe_invoice_id}",
        invoice.organization_id,
        invoice.id,
        {"stripe_invoice_id": stripe_invoice_id},
    )


class DeleteDraft(Kind):
    """Takes away a draft that was made beside the invoice's own, and that nothing was put on."""

    name = "delete_draft"
    is_harmless_twice = True

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        seen = stripe.get_invoice(operation.params["stripe_invoice_id"])
        if seen.status == "draft":
            stripe.delete_draft(seen.id)
        return seen

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        """Not looked for: what is gone is refused when it is asked for again."""
        return None


class AddLines(Kind):
    """All lines, a hundred in a call, each call whole or not at all: those that are there already
    are not added again."""

    name = "add_invoice_lines"
    is_harmless_twice = True

    async def prepare(self, session: AsyncSession, operation: Operation) -> dict[str, Any] | None:
        invoice = await _locked(session, operation.subject_id)
        if invoice.state not in ("frozen", "pushed", "differs"):
            raise NotNeeded(f"The invoice is {invoice.state}.")
        return operation.params

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        stripe_invoice_id, lines = _lines_of(operation)
        there = {line.metadata.get("position") for line in _listed(stripe, stripe_invoice_id)}
        for start in range(0, len(lines), LINES_PER_CALL):
            part = lines[start : start + LINES_PER_CALL]
            if part[0].metadata["position"] not in there:
                stripe.add_invoice_lines(
                    f"{operation.id}:{start}", stripe_invoice_id=stripe_invoice_id, lines=part
                )
        return stripe.get_invoice(stripe_invoice_id)

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        stripe_invoice_id, lines = _lines_of(operation)
        there = {line.metadata.get("position") for line in _listed(stripe, stripe_invoice_id)}
        if any(line.metadata["position"] not in there for line in lines):
            return None
        return stripe.get_invoice(stripe_invoice_id)

    async def confirmed(
        self, session: AsyncSession, operation: Operation, answer: StripeInvoice
    ) -> None:
        invoice = await _locked(session, operation.subject_id)
        if not advance(invoice, "pushed") and invoice.state not in ("pushed", "differs"):
            return
        await plan(
            session,
            FinaliseInvoice.name,
            f"finalise:{operation.id}",
            invoice.organization_id,
            invoice.id,
            {**operation.params, "due_cents": invoice.due_cents},
        )

    async def refused(self, session: AsyncSession, operation: Operation, why: Refusal) -> None:
        await _set_aside(session, operation, why)

    async def doubted(self, session: AsyncSession, operation: Operation, reason: str) -> None:
        await _set_aside(session, operation, Refusal(reason))


class FinaliseInvoice(Kind):
    """Compares the draft with what we put on it, then finalises it, which can happen but once."""

    name = "finalise_invoice"
    is_harmless_twice = True

    async def prepare(self, session: AsyncSession, operation: Operation) -> dict[str, Any] | None:
        invoice = await _locked(session, operation.subject_id)
        if invoice.state not in ("pushed", "differs"):
            raise NotNeeded(f"The invoice is {invoice.state}.")
        return operation.params

    def send(self, stripe: Stripe, operation: Operation) -> Answer:
        stripe_invoice_id, lines = _lines_of(operation)
        seen = stripe.get_invoice(stripe_invoice_id)
        if seen.status != "draft":
            return seen
        difference = _difference(stripe, seen, lines, operation.params["due_cents"])
        if difference:
            raise StripeRejected(difference, code=DIFFERS)
        failpoint("invoice_push.before_finalise")
        return stripe.finalise_invoice(operation.id, stripe_invoice_id)

    def find(self, stripe: Stripe, operation: Operation) -> Answer | None:
        seen = stripe.get_invoice(_lines_of(operation)[0])
        return None if seen.status == "draft" else seen

    async def confirmed(
        self, session: AsyncSession, operation: Operation, answer: StripeInvoice
    ) -> None:
        invoice = await _locked(session, operation.subject_id)
        await apply(session, invoice, answer)

    async def refused(self, session: AsyncSession, operation: Operation, why: Refusal) -> None:
        await _set_aside(session, operation, why)

    async def doubted(self, session: AsyncSession, operation: Operation, reason: str) -> None:
        await _set_aside(session, operation, Refusal(reason))


def _difference(
    stripe: Stripe, seen: StripeInvoice, lines: list[LineParams], due_cents: int
) -> str:
    """How the draft is not what we made it; empty if it is."""
    ours = sorted((line.metadata["position"], line.amount_cents) for line in lines)
    theirs = sorted(
        (line.metadata.get("position", ""), line.amount_cents) for line in _listed(stripe, seen.id)
    )
    if seen.total_cents != due_cents:
        return f"its draft at Stripe comes to {seen.total_cents} cents, not {due_cents}"
    if ours != theirs:
        return "the lines of its draft at Stripe are not ours"
    return ""


def _listed(stripe: Stripe, stripe_invoice_id: str) -> Any:
    return stripe.list_invoice_lines(stripe_invoice_id)


async def _line_params(session: AsyncSession, invoice: Invoice) -> dict[str, Any]:
    rows = await session.scalars(
        select(InvoiceLine)
        .where(InvoiceLine.invoice_id == invoice.id)
        .order_by(InvoiceLine.position)
    )
    lines = stripe_lines(invoice, rows.all())
    return {"stripe_invoice_id": invoice.stripe_invoice_id, "lines": msgspec.to_builtins(lines)}


def _lines_of(operation: Operation) -> tuple[str, list[LineParams]]:
    params = operation.params
    return params["stripe_invoice_id"], msgspec.convert(params["lines"], list[LineParams])


async def _locked(session: AsyncSession, invoice_id: str) -> Invoice:
    """As it is now; its organization's account is locked."""
    return await session.get_one(Invoice, invoice_id, populate_existing=True)


async def _set_aside(session: AsyncSession, operation: Operation, why: Refusal) -> None:
    invoice = await _locked(session, operation.subject_id)
    if invoice.state in ("frozen", "pushed", "differs"):
        is_gone = why.code == "resource_missing" and invoice.stripe_invoice_id is not None
        await set_aside(session, invoice, why.message, is_gone=is_gone)
