"""Payments: what goes through Stripe, and what is told to people about their money."""
