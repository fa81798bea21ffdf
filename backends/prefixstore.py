"""Sequences that left the KV cache, kept in RAM: a prompt that returns is copied back instead of decoded again.

Every cell of the cache is looked at in every step, whosever it is; what only waits to be asked for again is better kept
here. Knows nothing of any runtime: what a sequence looks like is bytes to it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

from .kvcache import common_prefix


class Stored(NamedTuple):
    """One sequence: its tokens, and the bytes that bring it back."""

    tokens: array[int]
    data: Any  # anything with a length in bytes (or another unit, the same as the store's limit)


class PrefixStore:
    """Sequences by their tokens, least recently used first, up to a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._entries: list[Stored] = []  # in order of last use
        self.size = 0  # bytes

    def put(self, tokens: array[int], save: Callable[[], Any]) -> None:
        """Keep a sequence, unless a stored one begins with it; `save` is only called if it is wanted."""
        if any(common_prefix(entry.tokens, tokens) == len(tokens) for entry in self._entries):
            return
        for covered in [e for e in self._entries if common_prefix(e.tokens, tokens) == len(e.tokens)]:
            self._drop(covered)
        entry = Stored(tokens, save())
        if len(entry.data) > self._most:
            return
        self._entries.append(entry)
        self.size += len(entry.data)
        self.shrink(self._most)

    def shrink(self, size: int) -> None:
        """Forget the sequences that were used least recently, until the rest takes no more than `size`."""
        while self.size > size:
            self._drop(self._entries[0])

    def longest_prefix(self, prompt: array[int]) -> tuple[Stored | None, int]:
        """The stored sequence that shares the most tokens with the start of `prompt`, and how many."""
        best, length = None, 0
        for entry in self._entries:
            common = common_prefix(entry.tokens, prompt)
            if common > length:
                best, length = entry, common
        return best, length

    def touch(self, entry: Stored) -> None:
        """Note that an entry was used."""
        self._entries.remove(entry)
        self._entries.append(entry)

    def clear(self) -> None:
        """Forget everything."""
        self._entries, self.size = [], 0

    def _drop(self, entry: Stored) -> None:
        self._entries.remove(entry)
        self.size -= len(entry.data)
