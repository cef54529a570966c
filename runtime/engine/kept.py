"""What was made of callers' schemas, for further requests with the same.

Owns how much of it is kept and whose goes first. Does not own what is made (constraints.py).
"""

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

MAX_KEPT_BYTES = 128 * 1024 * 1024
# A compiled schema takes 20 to 550 times its text.
BYTES_PER_SOURCE_BYTE = 512
BYTES_PER_ENTRY = 64 * 1024

T = TypeVar("T")


class Kept(Generic[T]):
    """Values by owner and key. Beyond the bound, what the owner of the most has used least
    recently goes first, so that nobody pushes out another's. Thread-safe."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, OrderedDict[bytes, tuple[T, int]]] = {}
        self._bytes: dict[str, int] = {}  # by owner

    def get(self, owner: str, key: bytes) -> T | None:
        with self._lock:
            entries = self._entries.get(owner)
            if entries is None or key not in entries:
                return None
            entries.move_to_end(key)
            return entries[key][0]

    def put(self, owner: str, key: bytes, value: T, num_source_bytes: int) -> None:
        """What is put last stays, whatever its size."""
        num_bytes = BYTES_PER_ENTRY + num_source_bytes * BYTES_PER_SOURCE_BYTE
        with self._lock:
            self._remove(owner, key)
            self._entries.setdefault(owner, OrderedDict())[key] = (value, num_bytes)
            self._bytes[owner] = self._bytes.get(owner, 0) + num_bytes
            while sum(self._bytes.values()) > self._max_bytes:
                largest = max(self._bytes, key=self._bytes.__getitem__)
                oldest = next(iter(self._entries[largest]))
                if (largest, oldest) == (owner, key):
                    break
                self._remove(largest, oldest)

    def _remove(self, owner: str, key: bytes) -> None:
        entries = self._entries.get(owner)
        if entries is None or key not in entries:
            return
        _, num_bytes = entries.pop(key)
        self._bytes[owner] -= num_bytes
        if not entries:
            del self._entries[owner], self._bytes[owner]
