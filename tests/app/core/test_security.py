"""Secrets are random, hashes verify, derived keys reveal nothing of each other."""

from app.core import security


def test_a_password_verifies_and_another_does_not() -> None:
    stored = security.hash_password("correct horse battery")
    assert security.is_password_right(stored, "correct horse battery")
    assert not security.is_password_right(stored, "correct horse")
    assert not security.is_password_right("not a hash", "correct horse battery")


def test_derived_keys_differ_by_every_part() -> None:
    keys = {
        security.derive_key(b"secret", *parts)
        for parts in [("a", "b"), ("a", "c"), ("ab",), ("a", "b", ""), ("b", "a")]
    }
    assert len(keys) == 5
    assert security.derive_key(b"other", "a", "b") not in keys
