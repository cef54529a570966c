"""Objects in the shapes that Stripe gives them: every member is there, null where it is of no use
here. Built from what is known when they begin; the handlers change them."""

from typing import Any

from tests.stripe_stand_in.errors import Object

BRANDS = {"4": "visa", "5": "mastercard", "3": "amex"}


def customer(id: str, created: int) -> Object:
    return {
        "id": id,
        "object": "customer",
        "balance": 0,
        "created": created,
        "delinquent": False,
        "invoice_prefix": id[-8:].upper(),
        "invoice_settings": {
            "custom_fields": None,
            "default_payment_method": None,
            "footer": None,
            "rendering_options": None,
        },
        "livemode": False,
        "metadata": {},
        "next_invoice_sequence": 1,
        "preferred_locales": [],
        "tax_exempt": "none",
        **_nulls("address currency default_source description discount email name phone shipping"),
        "test_clock": None,
    }


def payment_method(id: str, created: int, number: str) -> Object:
    """A card, or with `sepa_debit` instead of a number one that is collected later."""
    method: Object = {
        "id": id,
        "object": "payment_method",
        "allow_redisplay": "always",
        "billing_details": {"address": _address(), **_nulls("email name phone tax_id")},
        "created": created,
        "customer": None,
        "customer_account": None,
        "livemode": False,
        "metadata": {},
    }
    if number == "sepa_debit":
        details = {"bank_code": "37040044", "country": "DE", "last4": "3000", "fingerprint": id}
        return {**method, "type": "sepa_debit", "sepa_debit": details}
    return {**method, "type": "card", "card": _card(number)}


def checkout_session(id: str, created: int, url: str, params: Object) -> Object:
    item = params["line_items"][0]
    total = sum(
        line["price_data"]["unit_amount"] * line.get("quantity", 1) for line in params["line_items"]
    )
    return {
        "id": id,
        "object": "checkout.session",
        "amount_subtotal": total,
        "amount_total": total,
        "automatic_tax": {"enabled": False, **_nulls("liability provider status")},
        "cancel_url": params.get("cancel_url"),
        "client_reference_id": params.get("client_reference_id"),
        "created": created,
        "currency": item["price_data"]["currency"],
        "custom_fields": [],
        "custom_text": _nulls("after_submit shipping_address submit terms_of_service_acceptance"),
        "customer": params.get("customer"),
        "expires_at": params.get("expires_at", created + 24 * 3600),
        "livemode": False,
        "metadata": params.get("metadata", {}),
        "mode": params["mode"],
        "payment_intent": None,  # made when the customer pays
        "payment_method_options": {"card": {"request_three_d_secure": "automatic"}},
        "payment_method_types": ["card", "sepa_debit"],
        "payment_status": "unpaid",
        "phone_number_collection": {"enabled": False},
        "shipping_options": [],
        "status": "open",
        "success_url": params.get("success_url"),
        "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0},
        "ui_mode": "hosted",
        "url": url,
        **_nulls("adaptive_pricing after_expiration allow_promotion_codes consent invoice locale"),
        **_nulls("billing_address_collection client_secret collected_information setup_intent"),
        **_nulls("consent_collection currency_conversion customer_creation customer_account"),
        **_nulls("customer_details customer_email discounts integration_identifier subscription"),
        **_nulls("invoice_creation managed_payments origin_context payment_link permissions"),
        **_nulls("payment_method_collection payment_method_configuration_details submit_type"),
        **_nulls("recovered_from saved_payment_method_options shipping_address_collection"),
        **_nulls("shipping_cost wallet_options"),
    }


def payment_intent(id: str, created: int, amount: int, currency: str) -> Object:
    return {
        "id": id,
        "object": "payment_intent",
        "amount": amount,
        "amount_capturable": 0,
        "amount_details": {"tip": {}},
        "amount_received": 0,
        "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
        "capture_method": "automatic_async",
        "client_secret": f"{id}_secret_standin",
        "confirmation_method": "automatic",
        "created": created,
        "currency": currency,
        "livemode": False,
        "metadata": {},
        "payment_method_options": {},
        "payment_method_types": ["card", "sepa_debit"],
        "status": "requires_payment_method",
        **_nulls("application application_fee_amount canceled_at cancellation_reason customer"),
        **_nulls("customer_account description excluded_payment_method_types last_payment_error"),
        **_nulls("latest_charge managed_payments next_action on_behalf_of payment_method source"),
        **_nulls("payment_method_configuration_details processing receipt_email review shipping"),
        **_nulls("setup_future_usage statement_descriptor statement_descriptor_suffix"),
        **_nulls("transfer_data transfer_group"),
    }


def charge(id: str, created: int, intent: Object, method: Object) -> Object:
    """Of a payment intent; neither paid nor failed yet."""
    kind = method["type"]
    return {
        "id": id,
        "object": "charge",
        "amount": intent["amount"],
        "amount_captured": 0,
        "amount_refunded": 0,
        "billing_details": method["billing_details"],
        "calculated_statement_descriptor": "TAPEOUT",
        "captured": False,
        "created": created,
        "currency": intent["currency"],
        "customer": intent["customer"],
        "description": intent["description"],
        "disputed": False,
        "fraud_details": {},
        "livemode": False,
        "metadata": dict(intent["metadata"]),
        "outcome": {
            **_nulls("advice_code network_advice_code network_decline_code reason"),
            "network_status": "approved_by_network",
            "seller_message": "Payment complete.",
            "type": "authorized",
        },
        "paid": False,
        "payment_intent": intent["id"],
        "payment_method": method["id"],
        "payment_method_details": {"type": kind, kind: method[kind]},
        "refunded": False,
        "status": "pending",
        **_nulls("application application_fee application_fee_amount balance_transaction"),
        **_nulls(
            "failure_balance_transaction failure_code failure_message on_behalf_of receipt_url"
        ),
        **_nulls("receipt_email receipt_number review shipping source source_transfer"),
        **_nulls("statement_descriptor statement_descriptor_suffix transfer_data transfer_group"),
    }


def refund(id: str, created: int, charge: Object, amount: int) -> Object:
    return {
        "id": id,
        "object": "refund",
        "amount": amount,
        "charge": charge["id"],
        "created": created,
        "currency": charge["currency"],
        "destination_details": {"card": {"type": "pending"}, "type": "card"},
        "metadata": {},
        "payment_intent": charge["payment_intent"],
        "status": "succeeded",
        **_nulls("balance_transaction customer customer_account payment_method reason"),
        **_nulls("receipt_number source_transfer_reversal transfer_reversal"),
    }


def dispute(id: str, created: int, charge: Object, amount: int, reason: str) -> Object:
    return {
        "id": id,
        "object": "dispute",
        "amount": amount,
        "balance_transactions": [],
        "charge": charge["id"],
        "created": created,
        "currency": charge["currency"],
        "enhanced_eligibility_types": [],
        "evidence": {},
        "evidence_details": {
            "due_by": created + 7 * 86400,
            "enhanced_eligibility": {},
            "has_evidence": False,
            "past_due": False,
            "submission_count": 0,
        },
        "is_charge_refundable": False,
        "livemode": False,
        "metadata": {},
        "payment_intent": charge["payment_intent"],
        "payment_method_details": {"card": {"brand": "visa", "case_type": "chargeback"}},
        "reason": reason,
        "status": "needs_response",
    }


def balance_transaction(id: str, created: int, amount: int, fee: int, currency: str) -> Object:
    details = {"amount": fee, "currency": currency, "description": "Stripe processing fees"}
    return {
        "id": id,
        "object": "balance_transaction",
        "amount": amount,
        "available_on": created + 2 * 86400,
        "balance_type": "payments",
        "created": created,
        "currency": currency,
        "description": None,
        "exchange_rate": None,
        "fee": fee,
        "fee_details": [{**details, "application": None, "type": "stripe_fee"}] if fee else [],
        "net": amount - fee,
        "reporting_category": "charge",
        "source": None,
        "status": "pending",
        "type": "charge",
    }


def invoice(id: str, created: int, customer: Object, currency: str) -> Object:
    amounts = "amount_due amount_overpaid amount_paid amount_remaining amount_shipping"
    totals = "subtotal subtotal_excluding_tax total total_excluding_tax starting_balance"
    return {
        "id": id,
        "object": "invoice",
        "account_country": "US",
        "attempt_count": 0,
        "attempted": False,
        "auto_advance": False,
        "automatic_tax": {"enabled": False, **_nulls("disabled_reason liability provider status")},
        "billing_reason": "manual",
        "collection_method": "charge_automatically",
        "created": created,
        "currency": currency,
        "customer": customer["id"],
        "customer_email": customer["email"],
        "customer_name": customer["name"],
        "customer_tax_exempt": "none",
        "customer_tax_ids": [],
        "default_tax_rates": [],
        "discounts": [],
        "issuer": {"type": "self"},
        "lines": {
            "object": "list",
            "data": [],
            "has_more": False,
            "url": f"/v1/invoices/{id}/lines",
        },
        "livemode": False,
        "metadata": {},
        "payment_settings": _nulls("default_mandate payment_method_options payment_method_types"),
        "period_end": created,
        "period_start": created,
        "post_payment_credit_notes_amount": 0,
        "pre_payment_credit_notes_amount": 0,
        "rendering": None,
        "status": "draft",
        "status_transitions": _nulls("finalized_at marked_uncollectible_at paid_at voided_at"),
        "total_discount_amounts": [],
        "total_taxes": [],
        **dict.fromkeys(f"{amounts} {totals}".split(), 0),
        **_nulls("account_name account_tax_ids application automatically_finalizes_at parent"),
        **_nulls("custom_fields customer_account customer_address customer_phone receipt_number"),
        **_nulls("customer_shipping default_payment_method default_source description due_date"),
        **_nulls("effective_at ending_balance footer from_invoice hosted_invoice_url invoice_pdf"),
        **_nulls(
            "last_finalization_error latest_revision next_payment_attempt number on_behalf_of"
        ),
        **_nulls("shipping_cost shipping_details statement_descriptor test_clock"),
        **_nulls("total_pretax_credit_amounts webhooks_delivered_at"),
    }


def invoice_line(id: str, invoice: Object, amount: int, description: str, item_id: str) -> Object:
    created = invoice["created"]
    details = {
        "invoice_item": item_id,
        "proration": False,
        **_nulls("proration_details subscription"),
    }
    return {
        "id": id,
        "object": "line_item",
        "amount": amount,
        "currency": invoice["currency"],
        "description": description,
        "discount_amounts": [],
        "discountable": True,
        "discounts": [],
        "invoice": invoice["id"],
        "livemode": False,
        "metadata": {},
        "parent": {
            "invoice_item_details": details,
            "subscription_item_details": None,
            "type": "invoice_item_details",
        },
        "period": {"end": created, "start": created},
        "pretax_credit_amounts": [],
        "pricing": {"type": "price_details", "unit_amount_decimal": str(amount)},
        "quantity": 1,
        "quantity_decimal": "1",
        "subscription": None,
        "subtotal": amount,
        "taxes": [],
    }


def invoice_payment(id: str, created: int, invoice: Object, intent: Object) -> Object:
    return {
        "id": id,
        "object": "invoice_payment",
        "amount_paid": None,
        "amount_requested": invoice["amount_due"],
        "created": created,
        "currency": invoice["currency"],
        "invoice": invoice["id"],
        "is_default": True,
        "livemode": False,
        "payment": {"type": "payment_intent", "payment_intent": intent["id"]},
        "status": "open",
        "status_transitions": _nulls("canceled_at paid_at"),
    }


def portal_session(id: str, created: int, customer_id: str, return_url: str, url: str) -> Object:
    return {
        "id": id,
        "object": "billing_portal.session",
        "configuration": "bpc_standin",
        "created": created,
        "customer": customer_id,
        "livemode": False,
        "return_url": return_url,
        "url": url,
        **_nulls("customer_account flow locale on_behalf_of"),
    }


def event(id: str, created: int, type: str, subject: Object, api_version: str) -> Object:
    return {
        "id": id,
        "object": "event",
        "api_version": api_version,
        "created": created,
        "data": {"object": subject},
        "livemode": False,
        "pending_webhooks": 1,
        "request": _nulls("id idempotency_key"),
        "type": type,
    }


def _card(number: str) -> Object:
    brand = BRANDS.get(number[0], "unknown")
    return {
        "brand": brand,
        "checks": _nulls("address_line1_check address_postal_code_check cvc_check"),
        "country": "US",
        "display_brand": brand,
        "exp_month": 12,
        "exp_year": 2034,
        "fingerprint": f"fp{number[-8:]}",
        "funding": "credit",
        "last4": number[-4:],
        "networks": {"available": [brand], "preferred": None},
        "three_d_secure_usage": {"supported": True},
        **_nulls("generated_from regulated_status wallet"),
    }


def _address() -> Object:
    return _nulls("city country line1 line2 postal_code state")


def _nulls(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split())
