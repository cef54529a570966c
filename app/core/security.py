"""Secrets: how they are made, hashed and compared. Stores nothing itself."""

import hashlib
import hmac
import secrets

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


def derive_key(secret: bytes, *parts: str) -> bytes:
    """A key for one purpose that reveals nothing of the secret (HMAC-SHA-256)."""
    message = b"\0".join(part.encode() for part in parts)
    return hmac.new(secret, message, hashlib.sha256).digest()
