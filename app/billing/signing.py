"""The box's Ed25519 key, which signs the seals of its ledger.

Owns the key's file, which belongs in every backup: receipts name no key, so that whoever verifies
one has to know the public key from elsewhere.
"""

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from app.core.errors import Conflict
from app.core.failpoints import failpoint
from app.core.storage import fsync_directory


class SigningKey:
    """Signs digests. Its methods may be called from any thread."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.public_hex = raw.hex()

    def sign(self, sha256: str) -> str:
        """The signature of a digest's 32 bytes; both in hexadecimal."""
        return self._key.sign(bytes.fromhex(sha256)).hex()


def is_signed(public_hex: str, sha256: str, signature: str) -> bool:
    """Whether `signature` is that of `sha256` by the key; text that is no hexadecimal is not."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex))
        key.verify(bytes.fromhex(signature), bytes.fromhex(sha256))
    except (InvalidSignature, ValueError):
        return False
    return True


def open_key(path: Path) -> SigningKey:
    """The key in this file (PEM, PKCS #8), made at first use. Raises `Conflict` when the file
    holds something else."""
    if not path.exists():
        _make(path)
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise _unusable(path) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _unusable(path)
    return SigningKey(key)


def _make(path: Path) -> None:
    """Whole and durable under its name, or not there at all; never in place of another."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pem = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, pem)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    failpoint("signing.before_key_is_named")
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass  # another process was first
    finally:
        unfinished.unlink()
    fsync_directory(path.parent)
    failpoint("signing.after_key_is_named")


def _unusable(path: Path) -> Conflict:
    return Conflict(
        f"{path} is not an Ed25519 key. Restore it from a backup: with another key, receipts that "
        "were given out could no longer be verified.",
        code="bad_receipt_key",
    )
