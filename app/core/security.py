"""Secrets: how they are made, hashed and compared. Stores nothing itself."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

API_KEY_PREFIX = "tp-"
_passwords = PasswordHasher()


def new_token() -> str:
    """256 random bits, safe in a URL."""
    return secrets.token_urlsafe(32)


def new_api_key() -> str:
    return API_KEY_PREFIX + secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """What is stored of a random token. Tokens carry enough entropy to need no slow hash."""
    return hashlib.sha256(token.encode()).hexdigest()


def hash_password(password: str) -> str:
    """Argon2id; takes tens of milliseconds, so call it in a thread."""
    return _passwords.hash(password)


def is_password_right(password_hash: str, password: str) -> bool:
    """Slow like `hash_password`."""
    try:
        return _passwords.verify(password_hash, password)
    except (VerificationError, InvalidHashError):
        return False


def derive_key(box_secret: bytes, *parts: str) -> bytes:
    """A key for one purpose that reveals nothing of the box's secret (HMAC-SHA-256)."""
    message = b"\0".join(part.encode() for part in parts)
    return hmac.new(box_secret, message, hashlib.sha256).digest()


def load_box_secret(data_dir: Path) -> bytes:
    """The box's own secret: made at first start, kept in the data directory, readable by its
    owner alone. Losing it only empties caches."""
    path = data_dir / "box-secret"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(descriptor, "wb") as file:
        secret = secrets.token_bytes(32)
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    return secret
