"""What is hashed: the exact bytes of receipts and ledger transactions, and trees over them.

Pure. A tree is that of RFC 6962, section 2.1: leaves and inner nodes are hashed with different
first bytes, so that neither can be taken for the other.
"""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import msgspec

LEAF, NODE = b"\x00", b"\x01"

Line = tuple[str, int, int, int, int, str]


class ReceiptRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One usage event as it is hashed; its JSON, with the members in this order, are the bytes.
    Instants are UTC with microseconds. A line is dimension, quantity, price_nano, unit_scale,
    amount_nano and disposition; lines are in the order of their dimension's name."""

    event_id: str
    organization_id: str
    api_key_id: str
    api_key_name: str
    endpoint_name: str
    version_number: int
    route: str
    service_class: str
    outcome: str
    finish_reason: str
    price_book_id: str
    currency: str
    amount_nano: int
    started_at: str
    finished_at: str
    duration_ns: int
    first_token_ns: int | None
    lines: list[Line]

    @property
    def canonical(self) -> bytes:
        return msgspec.json.encode(self)


class TransactionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One ledger transaction as it is hashed. `entries` are account and amount, by account;
    `content_sha256` is the root over its receipts, empty for other kinds."""

    id: str
    idempotency_key: str
    kind: str
    organization_id: str
    currency: str
    content_sha256: str
    created_at: str
    entries: list[tuple[str, int]]

    @property
    def canonical(self) -> bytes:
        return msgspec.json.encode(self)


class PathStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The neighbour at one level of a tree, and on which side of us it stands."""

    side: Literal["left", "right"]
    sha256: str


def instant_text(at: datetime) -> str:
    """`2026-01-31T12:00:00.000000Z`"""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def leaf_hash(leaf: bytes) -> bytes:
    return hashlib.sha256(LEAF + leaf).digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The tree's hash; of no leaves that of nothing."""
    if not leaves:
        return hashlib.sha256().digest()
    return _root([leaf_hash(leaf) for leaf in leaves])


def merkle_path(leaves: Sequence[bytes], index: int) -> list[PathStep]:
    """From the leaf's neighbour up: what `root_of` needs beside the leaf itself."""
    return _path([leaf_hash(leaf) for leaf in leaves], index)


def root_of(leaf: bytes, path: Sequence[PathStep]) -> bytes:
    """The root of the tree that has this leaf at the end of this path."""
    digest = leaf_hash(leaf)
    for step in path:
        other = bytes.fromhex(step.sha256)
        digest = _node(other, digest) if step.side == "left" else _node(digest, other)
    return digest


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(NODE + left + right).digest()


def _split(count: int) -> int:
    """How many of the leaves go left: the largest power of two below their number."""
    return 1 << (count - 1).bit_length() - 1


def _root(hashes: Sequence[bytes]) -> bytes:
    if len(hashes) == 1:
        return hashes[0]
    left = _split(len(hashes))
    return _node(_root(hashes[:left]), _root(hashes[left:]))


def _path(hashes: Sequence[bytes], index: int) -> list[PathStep]:
    if len(hashes) == 1:
        return []
    left = _split(len(hashes))
    if index < left:
        return [*_path(hashes[:left], index), PathStep("right", _root(hashes[left:]).hex())]
    return [*_path(hashes[left:], index - left), PathStep("left", _root(hashes[:left]).hex())]
