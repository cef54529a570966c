"""What people and banks do: customers in the browser, card holders who dispute, a person in
Stripe's dashboard, and time that passes."""

from tests.stripe_stand_in import invoices, objects, payments
from tests.stripe_stand_in.account import Account, each_due
from tests.stripe_stand_in.errors import Object, refused

DISPUTE_FEE_CENTS = 1500


class People:
    """Acts on the account, past its API. Each returns the object as it is afterwards."""

    account: Account

    # The customer, on the Checkout page

    def pay_checkout(self, checkout_id: str, card: str = payments.GOOD_CARD) -> Object:
        """Fills in a card, or `sepa_debit`, and presses the button. Declined: the page stays open.
        With authentication or later collection, `authenticate` or `settle_payment` follows."""
        with self.account.lock:
            account, session = self.account, self.account.get("checkout.session", checkout_id)
            if session["status"] != "open":
                raise refused(f"The session is {session['status']}")
            intent = self._intent_of(session)
            method = payments.save_card(account, session["customer"], card)
            payments.confirm(account, intent, method, is_off_session=False)
            if intent["status"] in ("succeeded", "processing"):
                payments.complete_checkout(account, session, intent)
            return session

    def _intent_of(self, session: Object) -> Object:
        if session["payment_intent"]:
            return self.account.get("payment_intent", session["payment_intent"])
        intent = payments.new_intent(
            self.account, session["amount_total"], session["currency"], session["customer"]
        )
        params = self.account.intent_params[session["id"]]
        intent["metadata"] = params.get("metadata", {})
        intent["setup_future_usage"] = params.get("setup_future_usage")
        session["payment_intent"] = intent["id"]
        return intent

    def authenticate(self, payment_id: str, is_passed: bool = True) -> Object:
        """The customer's bank asks them (3-D Secure), and they pass or not."""
        with self.account.lock:
            account, intent = self.account, self.account.get("payment_intent", payment_id)
            method = account.get("payment_method", intent["payment_method"])
            if intent["status"] != "requires_action":
                raise refused("Nobody waits for an authentication")
            if is_passed:
                payments.succeed(account, intent, method)
                for session in self._sessions_of(payment_id):
                    payments.complete_checkout(account, session, intent)
            else:
                code = "payment_intent_authentication_failure"
                payments.decline(account, intent, method, code, "authentication_failed")
            return intent

    def settle_payment(self, payment_id: str, is_paid: bool = True) -> Object:
        """What was collected later, like a debit, comes in or bounces."""
        with self.account.lock:
            account, intent = self.account, self.account.get("payment_intent", payment_id)
            method = account.get("payment_method", intent["payment_method"])
            if is_paid:
                payments.succeed(account, intent, method)
            else:
                payments.decline(account, intent, method, "card_declined", "insufficient_funds")
            for session in self._sessions_of(payment_id):
                session["payment_status"] = "paid" if is_paid else "unpaid"
                outcome = "succeeded" if is_paid else "failed"
                account.emit(f"checkout.session.async_payment_{outcome}", session)
            return intent

    def _sessions_of(self, payment_id: str) -> list[Object]:
        found = self.account.all("checkout.session")
        return [each for each in found if each["payment_intent"] == payment_id]

    def expire_checkout(self, checkout_id: str) -> Object:
        """Its time is over."""
        with self.account.lock:
            session = self.account.get("checkout.session", checkout_id)
            return payments.expire_checkout(self.account, session)

    # The customer, in the portal

    def save_card(self, customer_id: str, card: str = payments.GOOD_CARD) -> Object:
        """Adds a card and makes it the one that invoices are paid with."""
        with self.account.lock:
            customer = self.account.get("customer", customer_id)
            method = payments.save_card(self.account, customer_id, card)
            customer["invoice_settings"]["default_payment_method"] = method["id"]
            self.account.emit("customer.updated", customer)
            return method

    def remove_card(self, payment_method_id: str) -> Object:
        with self.account.lock:
            method = self.account.get("payment_method", payment_method_id)
            customer = self.account.get("customer", method["customer"])
            settings = customer["invoice_settings"]
            if settings["default_payment_method"] == payment_method_id:
                settings["default_payment_method"] = None
                self.account.emit("customer.updated", customer)
            method["customer"] = None
            self.account.emit("payment_method.detached", method)
            return method

    def change_card(self, payment_method_id: str, card: str) -> None:
        """From now on the saved card answers as this number does."""
        with self.account.lock:
            self.account.cards[payment_method_id] = card

    def pay_invoice(self, stripe_invoice_id: str, card: str = payments.GOOD_CARD) -> Object:
        """On the invoice's own page."""
        with self.account.lock:
            invoice = self.account.get("invoice", stripe_invoice_id)
            method = payments.save_card(self.account, invoice["customer"], card)
            return invoices.collect(self.account, invoice, method)

    # Card holders and banks

    def open_dispute(
        self,
        payment_id: str,
        amount_cents: int | None = None,
        reason: str = "fraudulent",
        is_inquiry: bool = False,
    ) -> Object:
        """The card's owner disputes a payment. The money and a fee are withdrawn at once, except
        for a mere inquiry."""
        with self.account.lock:
            account, charge = self.account, self._charge_of(payment_id)
            left = charge["amount"] - charge["amount_refunded"]
            amount = left if amount_cents is None else amount_cents
            now = account.clock.now()
            dispute = objects.dispute(account.new_id("dp"), now, charge, amount, reason)
            charge["disputed"] = True
            account.add(dispute)
            if is_inquiry:
                dispute |= {"status": "warning_needs_response", "is_charge_refundable": True}
                charge["disputed"] = False
            else:
                self._move_dispute(dispute, -amount, DISPUTE_FEE_CENTS)
            account.emit("charge.dispute.created", dispute)
            if not is_inquiry:
                account.emit("charge.dispute.funds_withdrawn", dispute)
            return dispute

    def win_dispute(self, dispute_id: str, is_fee_returned: bool = False) -> Object:
        with self.account.lock:
            dispute = self.account.get("dispute", dispute_id)
            fee = -DISPUTE_FEE_CENTS if is_fee_returned else 0
            if dispute["status"].startswith("warning"):
                dispute["status"] = "warning_closed"
            else:
                dispute["status"] = "won"
                self._move_dispute(dispute, dispute["amount"], fee)
                self.account.emit("charge.dispute.funds_reinstated", dispute)
            self.account.emit("charge.dispute.closed", dispute)
            return dispute

    def lose_dispute(self, dispute_id: str) -> Object:
        with self.account.lock:
            dispute = self.account.get("dispute", dispute_id)
            dispute["status"] = "lost"
            self.account.emit("charge.dispute.closed", dispute)
            return dispute

    def _move_dispute(self, dispute: Object, amount: int, fee: int) -> None:
        transaction = self.account.move("adjustment", amount, fee, dispute)
        dispute["balance_transactions"].append(transaction)

    def _charge_of(self, payment_id: str) -> Object:
        intent = self.account.get("payment_intent", payment_id)
        return self.account.get("charge", intent["latest_charge"])

    def fail_refund(self, refund_id: str) -> Object:
        """The bank sends a refund back."""
        with self.account.lock:
            refund = self.account.get("refund", refund_id)
            payments.fail_refund(self.account, refund)
            return refund

    # A person in the dashboard

    def charge_by_hand(
        self,
        customer_id: str,
        amount_cents: int,
        currency: str = "usd",
        metadata: dict[str, str] | None = None,
    ) -> Object:
        """A payment of a customer's card that has nothing to do with the box."""
        with self.account.lock:
            account = self.account
            cards = [each for each in account.all("payment_method") if each["customer"]]
            card = next(each for each in cards if each["customer"] == customer_id)
            intent = payments.new_intent(account, amount_cents, currency, customer_id)
            intent["metadata"] = metadata or {}
            payments.confirm(account, intent, card, is_off_session=True)
            return intent

    def refund_by_hand(self, payment_id: str, amount_cents: int | None = None) -> Object:
        with self.account.lock:
            return payments.refund(self.account, self._charge_of(payment_id), amount_cents, {})

    def add_line_by_hand(
        self, stripe_invoice_id: str, amount_cents: int, description: str = "Setup fee"
    ) -> Object:
        """Alters a draft, so that its total is no longer ours."""
        with self.account.lock:
            invoice = self.account.get("invoice", stripe_invoice_id)
            line = {"amount": amount_cents, "description": description}
            return invoices.add_lines(self.account, invoice, [line])

    def forbid_finalising(self, stripe_invoice_id: str, is_forbidden: bool = True) -> None:
        """Something about the customer keeps the draft from being finalised, until it is mended."""
        with self.account.lock:
            change = self.account.stuck_ids.add if is_forbidden else self.account.stuck_ids.discard
            change(stripe_invoice_id)

    def void_by_hand(self, stripe_invoice_id: str) -> Object:
        with self.account.lock:
            invoice = self.account.get("invoice", stripe_invoice_id)
            return invoices.end(self.account, invoice, "void", ("open", "uncollectible"))

    def delete_customer(self, customer_id: str) -> Object:
        with self.account.lock:
            customer = self.account.get("customer", customer_id)
            customer["deleted"] = True
            self.account.emit("customer.deleted", customer)
            return customer

    def pay_out(self, amount_cents: int, currency: str = "usd") -> Object:
        """Moves money from the balance to the operator's bank."""
        with self.account.lock:
            payout = {"id": self.account.new_id("po"), "object": "payout", "currency": currency}
            payout |= {"amount": amount_cents, "created": self.account.clock.now()}
            self.account.add(payout)
            self.account.move("payout", -amount_cents, 0, payout)
            self.account.emit("payout.paid", payout)
            return payout

    def refund_late(self, is_late: bool = True) -> None:
        """From now on refunds are pending, until `send_refunds`."""
        with self.account.lock:
            self.account.is_refunding_late = is_late

    def send_refunds(self) -> None:
        with self.account.lock:
            for refund in self.account.all("refund"):
                if refund["status"] == "pending":
                    refund["status"] = "succeeded"
                    self.account.emit("refund.updated", refund)

    def settle_in(self, currency: str, percent: int) -> None:
        """From now on the balance is kept in this currency, of which a cent of any other is worth
        so many hundredths."""
        with self.account.lock:
            self.account.settlement = (currency, percent)

    # Time

    def book_late(self, is_late: bool = True) -> None:
        """From now on charges have no balance transaction, as at Stripe they may have none yet,
        until `book_charges`."""
        with self.account.lock:
            self.account.is_booking_late = is_late

    def book_charges(self) -> None:
        with self.account.lock:
            for charge in self.account.all("charge"):
                if charge["paid"] and charge["balance_transaction"] is None:
                    payments.book(self.account, charge)
                    self.account.emit("charge.updated", charge)

    def collect_invoice(self, stripe_invoice_id: str) -> Object:
        """Stripe tries to collect an open invoice, as it does an hour after finalising."""
        with self.account.lock:
            invoice = self.account.get("invoice", stripe_invoice_id)
            return invoices.collect(self.account, invoice)

    def let_time_pass(self) -> None:
        """Does what is due by the clock: sessions expire, invoices are collected or overdue."""
        with self.account.lock:
            account, now = self.account, self.account.clock.now()
            for session in list(each_due(account.all("checkout.session"), "expires_at", now)):
                if session["status"] == "open":
                    payments.expire_checkout(account, session)
            drafts = each_due(account.all("invoice"), "automatically_finalizes_at", now)
            for invoice in list(drafts):
                if invoice["status"] == "draft":
                    invoices.finalise(account, invoice, is_advancing=True)
            due = each_due(account.all("invoice"), "next_payment_attempt", now)
            for invoice in list(due):
                invoices.collect(account, invoice)
            for invoice in list(each_due(account.all("invoice"), "due_date", now)):
                if invoice["status"] == "open" and invoice["id"] not in account.overdue_ids:
                    account.overdue_ids.add(invoice["id"])
                    account.emit("invoice.overdue", invoice)
