"""Who fills the store of compiled schemas pushes out their own."""

from runtime.engine import kept
from runtime.engine.kept import Kept

SIZE = kept.BYTES_PER_ENTRY


def test_the_owner_of_the_most_gives_way() -> None:
    store = Kept[int](4 * SIZE)
    store.put("few", b"a", 1, 0)
    for at in range(9):
        store.put("many", bytes([at]), at, 0)
        assert store.get("many", b"\x00") == 0  # used, so it stays
    assert store.get("few", b"a") == 1
    assert [at for at in range(9) if store.get("many", bytes([at])) is not None] == [0, 7, 8]
    store.put("few", b"b", 2, 0)
    assert store.get("few", b"a") == 1
    assert store.get("few", b"b") == 2


def test_size_counts_and_what_is_put_last_stays() -> None:
    store = Kept[int](4 * SIZE)
    store.put("x", b"a", 1, 0)
    store.put("x", b"b", 2, SIZE)
    assert store.get("x", b"a") is None
    assert store.get("x", b"b") == 2
    store.put("x", b"b", 3, 0)
    store.put("x", b"a", 1, 0)
    assert (store.get("x", b"a"), store.get("x", b"b")) == (1, 3)
