"""The key of a box that has seals already: it must be the one that signed the last of them.

Owns the check at the start. The key's file is `signing.py`'s.
"""

import logging
from pathlib import Path

from app.billing.proofs import SignedSeal
from app.billing.seals import last_seals
from app.billing.signing import SigningKey, is_signed, open_key
from app.core.database import create_writer_engine
from app.core.errors import Conflict

# Beside the key, made by whoever lost it for good and knows that earlier seals stay with it.
ACCEPT_NAME = "accept-new-key"

log = logging.getLogger(__name__)


def open_sealing_key(sync_database_url: str, path: Path) -> SigningKey:
    """The box's key, made on a box that has no seal yet. Blocks. Raises `Conflict` when it is
    missing or did not sign the last seal, unless the file `accept-new-key` lies beside it; that
    is removed once a seal is signed by the new key."""
    seal = _last_seal(sync_database_url)
    accepting = path.with_name(ACCEPT_NAME)
    if seal is None:
        return open_key(path)
    if not path.exists() and not accepting.exists():
        raise _lost(path, "is missing")
    key = open_key(path)
    if is_signed(key.public_hex, seal.sha256, seal.signature):
        accepting.unlink(missing_ok=True)
    elif accepting.exists():
        log.warning("seals up to number %d are not signed by the key %s", seal.number, path)
    else:
        raise _lost(path, f"is not the key that signed seal {seal.number}")
    return key


def _last_seal(sync_database_url: str) -> SignedSeal | None:
    engine = create_writer_engine(sync_database_url)
    try:
        with engine.execution_options(sqlite_begin="").begin() as connection:
            return next(iter(last_seals(connection, 1)), None)
    finally:
        engine.dispose()


def _lost(path: Path, what: str) -> Conflict:
    return Conflict(
        f"{path} {what}: restore it from a backup. If it is lost for good, create the empty file "
        f"{path.with_name(ACCEPT_NAME)} to go on with another key; receipts and seals until now "
        "can then only be verified with the old public key.",
        code="lost_receipt_key",
    )
