"""A stand-in for Stripe: an HTTP server that keeps state, speaks its REST form, checks parameters
against the types of the pinned SDK, replays idempotency keys, sends webhooks and fails on demand.

`python -m tests.stripe_stand_in --port 12111` runs one to look at; tests take the fixture
`stripe_stand_in` of `fixtures.py`.
"""
