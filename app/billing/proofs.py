"""Proofs of receipts: what one is made of, and how anyone verifies it without the box.

Pure; `tapeout receipt verify` runs this on a file. Described in docs/receipts.md.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, TypeVar

import msgspec

from app.billing.digests import (
    PathStep,
    ReceiptRecord,
    TransactionRecord,
    instant_text,
    root_of,
)
from app.billing.signing import is_signed
from app.core.money import price_of

FORMAT = "tapeout.receipt/1"
GENESIS_SHA256 = "0" * 64  # what stands for the seal before the first
MAX_PATH_STEPS = 64
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")

Canonical = TypeVar("Canonical", ReceiptRecord, TransactionRecord)


class SealRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A seal as it is hashed: its JSON, with the members in this order."""

    number: int
    previous_sha256: str
    root_sha256: str
    num_transactions: int
    created_at: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class SignedSeal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sha256` is of the fields before it, `signature` (Ed25519) of its 32 bytes."""

    number: int
    previous_sha256: str
    root_sha256: str
    num_transactions: int
    created_at: str
    sha256: str
    signature: str

    @property
    def record(self) -> SealRecord:
        return SealRecord(
            number=self.number,
            previous_sha256=self.previous_sha256,
            root_sha256=self.root_sha256,
            num_transactions=self.num_transactions,
            created_at=self.created_at,
        )


class Proof(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """That a receipt is in the ledger, and with which text: `receipt` and `transaction` are the
    very bytes that were hashed, as UTF-8. Each path leads from its leaf to a root: that of the
    transaction's receipts, and that of the seal's transactions."""

    format: Literal["tapeout.receipt/1"] = FORMAT
    receipt: str
    receipt_path: list[PathStep]
    transaction: str
    transaction_path: list[PathStep]
    seal: SignedSeal
    public_key: str


class ProofError(Exception):
    """The first thing that is wrong with a receipt or its proof, in words for its holder."""


class Verified(msgspec.Struct, frozen=True):
    """A receipt that is what the box signed. `checks` tells what was verified, in order."""

    receipt: ReceiptRecord
    transaction: TransactionRecord
    seal: SignedSeal
    public_key: str
    checks: list[str]


class Saved(msgspec.Struct, frozen=True):
    """What a file holds: a proof, and names of what stands beside it that no proof tells."""

    proof: Proof
    unproved: list[str]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dimension: str
    quantity: int
    price_nano: int
    unit_scale: int
    amount_nano: int
    disposition: str


class _Book(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    number: int | None
    sha256: str | None


class _Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the box answers, see `app/api/receipts.py`."""

    object: Literal["receipt"] = "receipt"

    request_id: str
    model: str
    version: int
    api_key_name: str
    route: str
    service_class: str
    outcome: str
    finish_reason: str
    currency: str
    amount_nano: int
    price_book: _Book
    started_at: datetime
    finished_at: datetime
    duration_ns: int
    first_token_ns: int | None
    lines: list[_Line]
    serving_note: str = ""
    proof: Proof | None


def read_proof(data: bytes) -> Proof:
    """A saved proof, or a saved answer of `/v1/receipts/ID` that holds one. Raises `ProofError`."""
    return read_saved(data).proof


def read_saved(data: bytes) -> Saved:
    """As `read_proof`. Whatever else a saved answer says must be what is proved, but for what is
    named as `unproved`. Raises `ProofError`."""
    try:
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        if "proof" not in fields:
            proof = msgspec.json.decode(data, type=Proof)
            _check_names(data)
            return Saved(proof, [])
        answer = msgspec.json.decode(data, type=_Answer)
        _check_names(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProofError(f"this is not a receipt's proof: {error}") from error
    if answer.proof is None:
        raise ProofError(
            "the receipt was not sealed yet when it was saved: get it again, some seconds later"
        )
    _same_as_answer(answer, answer.proof)
    return Saved(answer.proof, _unproved(answer))


def verify_proof(proof: Proof, public_key: str | None = None) -> Verified:
    """Recomputes everything from the receipt's lines to the seal's signature, by `public_key` or,
    without, by the key that the proof names. Raises `ProofError`."""
    receipt = _canonical(proof.receipt, ReceiptRecord, "receipt")
    transaction = _canonical(proof.transaction, TransactionRecord, "transaction")
    checks = [_check_lines(receipt)]
    _check_transaction(receipt, transaction)
    root = _root(proof.receipt, proof.receipt_path, "receipt_path")
    if root != transaction.content_sha256:
        raise ProofError(
            f"the receipt is not the one of ledger transaction {transaction.id}: their hashes "
            "differ"
        )
    checks.append(f"the receipt's SHA-256 leads to that of ledger transaction {transaction.id}")
    seal = proof.seal
    root = _root(proof.transaction, proof.transaction_path, "transaction_path")
    if root != seal.root_sha256:
        raise ProofError(f"the ledger transaction is not in seal {seal.number}: hashes differ")
    checks.append(f"the transaction's SHA-256 leads to the root of seal {seal.number}")
    if seal.record.sha256 != seal.sha256:
        raise ProofError(f"the hash of seal {seal.number} is not that of what it says")
    key = public_key or proof.public_key
    if proof.public_key != key:
        raise ProofError(f"the receipt names the key {proof.public_key}, not the one you trust")
    if not _SIGNATURE.fullmatch(seal.signature) or not _SHA256.fullmatch(key):
        raise ProofError("the signature or the key is not hexadecimal of the right length")
    if not is_signed(key, seal.sha256, seal.signature):
        raise ProofError(f"the signature of seal {seal.number} is not by the key {key}")
    checks.append(f"seal {seal.number} of {seal.created_at} is signed by {key}")
    return Verified(receipt, transaction, seal, key, checks)


def _canonical(text: str, kind: type[Canonical], name: str) -> Canonical:
    """Only the one text that a record has is taken: no two can be read from the same bytes."""
    try:
        record = msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ProofError(f"{name}: {error}") from error
    if record.canonical != text.encode():
        raise ProofError(f"{name}: not in the form that is hashed")
    return record


def wrong_line(receipt: ReceiptRecord) -> str | None:
    """What is wrong with a receipt's arithmetic, if anything: each billed line is quantity x
    price / scale, rounded half to even; the rest cost nothing; the lines add up."""
    for dimension, quantity, price_nano, unit_scale, amount_nano, disposition in receipt.lines:
        if quantity < 0 or unit_scale < 1:
            return f"line {dimension}: quantity and scale make no sense"
        is_billed = disposition == "billed"
        expected = price_of(quantity, price_nano, unit_scale) if is_billed else 0
        if amount_nano != expected:
            return (
                f"line {dimension}: {quantity} x {price_nano} / {unit_scale}, {disposition}, is "
                f"{expected}, not {amount_nano}"
            )
    total = sum(line[4] for line in receipt.lines)
    if total != receipt.amount_nano:
        return f"the lines add up to {total}, not to {receipt.amount_nano}"
    return None


def _check_lines(receipt: ReceiptRecord) -> str:
    if wrong := wrong_line(receipt):
        raise ProofError(wrong)
    return (
        f"{len(receipt.lines)} lines are quantity x price / scale, and add up to "
        f"{receipt.amount_nano} nano-units of {receipt.currency}"
    )


def _check_transaction(receipt: ReceiptRecord, transaction: TransactionRecord) -> None:
    if transaction.organization_id != receipt.organization_id:
        raise ProofError("the ledger transaction is another organization's")
    if transaction.currency != receipt.currency:
        raise ProofError("the ledger transaction is in another currency")
    if sum(amount_nano for _, amount_nano in transaction.entries):
        raise ProofError(f"the entries of ledger transaction {transaction.id} do not sum to zero")


def _root(leaf: str, path: Sequence[PathStep], name: str) -> str:
    if len(path) > MAX_PATH_STEPS or not all(_SHA256.fullmatch(step.sha256) for step in path):
        raise ProofError(f"{name}: a step is not a SHA-256 in hexadecimal")
    return root_of(leaf.encode(), path).hex()


def _check_names(data: bytes) -> None:
    """No member may be there twice: of two, one would be read here and the other by somebody else.
    Once the data has its type, so that it is not deep."""

    def once(members: list[tuple[str, object]]) -> None:
        names = [name for name, _ in members]
        if len(set(names)) < len(names):
            raise ProofError(f"a member is there twice, of {', '.join(sorted(set(names)))}")

    json.loads(data, object_pairs_hook=once)


def _unproved(answer: _Answer) -> list[str]:
    """What the box says beside the receipt, of prices and of its model."""
    said = {
        "price_book.number": answer.price_book.number,
        "price_book.sha256": answer.price_book.sha256,
        "serving_note": answer.serving_note,
    }
    return [name for name, value in said.items() if value]


def _same_as_answer(answer: _Answer, proof: Proof) -> None:
    """What the box's answer says in its own fields must be what is proved."""
    receipt = _canonical(proof.receipt, ReceiptRecord, "receipt")
    proved: dict[str, object] = {
        "request_id": receipt.event_id.rpartition(":")[0],
        "model": receipt.endpoint_name,
        "version": receipt.version_number,
        "lines": [_Line(*line) for line in receipt.lines],
        "price_book": receipt.price_book_id,
    }
    said: dict[str, object] = {
        "lines": sorted(answer.lines, key=lambda line: line.dimension),
        "price_book": answer.price_book.id,
        "started_at": _instant_text(answer.started_at),
        "finished_at": _instant_text(answer.finished_at),
    }
    for name in _Answer.__struct_fields__:
        if name in ("object", "proof", "serving_note"):
            continue
        expected = proved[name] if name in proved else getattr(receipt, name)
        if said.get(name, getattr(answer, name)) != expected:
            raise ProofError(f"{name} is not what the proof says: {expected!r}")


def _instant_text(at: datetime) -> str:
    return "without a time zone" if at.tzinfo is None else instant_text(at)
