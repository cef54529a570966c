"""Trees as RFC 6962 has them, and paths that lead to their roots and to no other."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.billing.digests import PathStep, leaf_hash, merkle_path, merkle_root, root_of


def test_the_roots_of_small_trees_by_hand() -> None:
    a, b, c = (hashlib.sha256(b"\x00" + text).digest() for text in (b"a", b"b", b"c"))
    ab = hashlib.sha256(b"\x01" + a + b).digest()
    assert merkle_root([]) == hashlib.sha256(b"").digest()
    assert merkle_root([b"a"]) == a
    assert merkle_root([b"a", b"b"]) == ab
    assert merkle_root([b"a", b"b", b"c"]) == hashlib.sha256(b"\x01" + ab + c).digest()


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=40), st.data())
def test_a_path_leads_to_the_root(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    path = merkle_path(leaves, index)
    assert root_of(leaves[index], path) == merkle_root(leaves)
    assert root_of(leaves[index] + b"!", path) != merkle_root(leaves)


def test_an_inner_node_is_no_leaf() -> None:
    leaves = [b"a", b"b", b"c", b"d"]
    inner = leaf_hash(b"a") + leaf_hash(b"b")
    right = merkle_path(leaves, 0)[-1]
    assert root_of(inner, [right]) != merkle_root(leaves)


@pytest.mark.parametrize("count", range(1, 18))
def test_a_path_is_as_long_as_the_tree_is_deep(count: int) -> None:
    leaves = [bytes([index]) for index in range(count)]
    assert all(
        len(merkle_path(leaves, index)) <= max(0, (count - 1).bit_length())
        for index in range(count)
    )
    assert isinstance(merkle_path([b"a", b"b"], 0)[0], PathStep)
