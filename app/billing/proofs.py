"""Proofs of receipts: what one is made of, and how anyone verifies it without the box.

Pure; `tapeout receipt verify` runs this on a file. Described in docs/receipts.md.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

from app.billing.digests import PathStep, ReceiptRecord, TransactionRecord, root_of
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


class _Line(msgspec.Struct, frozen=True):
    dimension: str
    quantity: int
    price_nano: int
    unit_scale: int
    amount_nano: int
    disposition: str


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the box answers, as far as the proof tells the same."""

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
    duration_ns: int
    first_token_ns: int | None
    lines: list[_Line]
    proof: Proof | None


def read_proof(data: bytes) -> Proof:
    """A saved proof, or a saved answer of `/v1/receipts/ID` that holds one. Raises `ProofError`."""
    try:
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        if "proof" not in fields:
            return msgspec.json.decode(data, type=Proof)
        answer = msgspec.json.decode(data, type=_Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProofError(f"this is not a receipt's proof: {error}") from error
    if answer.proof is None:
        raise ProofError(
            "the receipt was not sealed yet when it was saved: get it again, some seconds later"
        )
    _same_as_answer(answer, answer.proof)
    return answer.proof


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
    except msgspec.MsgspecError as error:
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


def _same_as_answer(answer: _Answer, proof: Proof) -> None:
    """What the box's answer says in its own fields must be what is proved."""
    receipt = _canonical(proof.receipt, ReceiptRecord, "receipt")
    proved: dict[str, object] = {
        "request_id": receipt.event_id.rpartition(":")[0],
        "model": receipt.endpoint_name,
        "version": receipt.version_number,
        "lines": [_Line(*line) for line in receipt.lines],
    }
    for name in _Answer.__struct_fields__:
        said, expected = getattr(answer, name), proved.get(name, getattr(receipt, name, None))
        if name == "lines":
            said = sorted(said, key=lambda line: line.dimension)
        if name != "proof" and said != expected:
            raise ProofError(f"{name} is not what the proof says: {expected!r}")
