"""Reconciliation: every set of books that must agree, compared again and again."""
