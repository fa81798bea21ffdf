"""Sequences that left the KV cache, kept in RAM: a prompt that returns is copied back instead of decoded again.

Every cell of the cache is looked at in every step, whosever it is; what only waits to be asked for again is better kept
here. Knows nothing of any runtime: what a sequence looks like is bytes to it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any, NamedTuple

from .kvcache import common_prefix


class Stored(NamedTuple):
    """One sequence: its tokens, and the bytes that bring it back."""

    tokens: array[int]
    data: Any  # anything with a length in bytes (or another unit, the same as the store's limit)


class PrefixStore:
    """Sequences by their tokens, least recently used first, up to a number of bytes; 0 keeps nothing.

    Their tokens' bytes are kept in order. What shares most with a prompt's start is then one of the prompt's two
    neighbours, however many there are; and since no entry begins with another, so is what a new one begins with.
    """

    def __init__(self, most_bytes: int, gone: Callable[[Any], None] = lambda data: None) -> None:
        self._most = most_bytes
        self._gone = gone  # is told the data of every entry that is forgotten
        self._entries: dict[bytes, Stored] = {}  # by the bytes of their tokens, in order of last use
        self._order: list[bytes] = []  # the keys of the entries, sorted
        self.size = 0  # bytes

    def put(self, tokens: array[int], save: Callable[[], Any]) -> None:
        """Keep a sequence, unless a stored one begins with it; `save` is only called if it is wanted."""
        if not self._most:
            return
        key = tokens.tobytes()
        before, after = self._neighbours(key)
        if after is not None and after.startswith(key):
            return
        if before is not None and key.startswith(before):
            self._drop(before)
        entry = Stored(tokens, save())
        if len(entry.data) > self._most:
            self._gone(entry.data)
            return
        self._entries[key] = entry
        insort(self._order, key)
        self.size += len(entry.data)
        self.shrink(self._most)

    def shrink(self, size: int) -> None:
        """Forget the sequences that were used least recently, until the rest takes no more than `size`."""
        while self.size > size:
            self._drop(next(iter(self._entries)))

    def longest_prefix(self, prompt: array[int]) -> tuple[Stored | None, int]:
        """The stored sequence that shares the most tokens with the start of `prompt`, and how many."""
        best, length = None, 0
        for key in self._neighbours(prompt.tobytes()):
            if key is not None and (common := common_prefix(self._entries[key].tokens, prompt)) > length:
                best, length = self._entries[key], common
        return best, length

    def touch(self, entry: Stored) -> None:
        """Note that an entry was used."""
        key = entry.tokens.tobytes()
        self._entries[key] = self._entries.pop(key)

    def clear(self) -> None:
        """Forget everything, at once."""
        self._entries, self._order, self.size = {}, [], 0

    def _neighbours(self, key: bytes) -> tuple[bytes | None, bytes | None]:
        """The last key before this one, and the first that is not."""
        place = bisect_left(self._order, key)
        before = self._order[place - 1] if place else None
        return before, self._order[place] if place < len(self._order) else None

    def _drop(self, key: bytes) -> None:
        data = self._entries.pop(key).data
        self.size -= len(data)
        self._gone(data)
        del self._order[bisect_left(self._order, key)]
