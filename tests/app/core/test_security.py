"""Secrets are random, hashes verify, derived keys reveal nothing of each other."""

import stat
from pathlib import Path

from app.core import security


def test_a_password_verifies_and_another_does_not() -> None:
    stored = security.hash_password("correct horse battery")
    assert security.is_password_right(stored, "correct horse battery")
    assert not security.is_password_right(stored, "correct horse")
    assert not security.is_password_right("not a hash", "correct horse battery")


def test_the_box_secret_is_made_once_and_private(tmp_path: Path) -> None:
    secret = security.load_box_secret(tmp_path)
    assert len(secret) == 32
    assert security.load_box_secret(tmp_path) == secret
    assert stat.S_IMODE((tmp_path / "box-secret").stat().st_mode) == 0o600


def test_derived_keys_differ_by_every_part() -> None:
    keys = {
        security.derive_key(b"secret", *parts)
        for parts in [("a", "b"), ("a", "c"), ("ab",), ("a", "b", ""), ("b", "a")]
    }
    assert len(keys) == 5
    assert security.derive_key(b"other", "a", "b") not in keys
