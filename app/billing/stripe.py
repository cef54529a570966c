"""Stripe, as far as this box uses it: the one module that speaks to its SDK.

Owns the client, retries and what errors mean. When something is done, and how often, is decided
in `payments/`.
"""

import stripe

API_VERSION = stripe.api_version
