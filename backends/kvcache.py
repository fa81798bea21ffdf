"""Which tokens lie in which sequence of the KV cache, and what a new prompt can reuse. Pure bookkeeping.

A sequence is *running* while a reply is written into it and *retained* after that, until its cells are wanted for
something else. A new sequence starts as a copy of the longest prefix that any other has; the copy shares its cells.
Knows nothing of any runtime: a backend does to its memory what it is told here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class CachedSequence:
    """One sequence id of the KV cache and the tokens that are decoded in it."""

    __slots__ = ("id", "running", "spans", "tokens")

    def __init__(self, sequence_id: int, tokens: array[int], spans: tuple[tuple[int, int], ...]) -> None:
        self.id = sequence_id
        self.tokens = tokens
        # Where its cells come from: (id of the sequence that first decoded them, position from which on).
        # Sequence ids return, so the first field is a count that never does.
        self.spans = spans
        self.running = True

    @property
    def length(self) -> int:
        """Tokens decoded in it."""
        return len(self.tokens)


class KVCache:
    """The sequences of one KV cache, most recently used last."""

    def __init__(self, sequences: int, cells: int) -> None:
        self.cells = cells  # tokens that fit, all sequences together
        self._free_ids = list(range(sequences - 1, -1, -1))
        self._sequences: dict[int, CachedSequence] = {}  # in order of last use
        self._births = 0

    def __iter__(self) -> Iterator[CachedSequence]:
        return iter(self._sequences.values())

    def longest_prefix(self, prompt: array[int]) -> tuple[CachedSequence | None, int]:
        """The sequence that shares the most tokens with the start of `prompt`, and how many."""
        best, length = None, 0
        for sequence in self._sequences.values():
            common = common_prefix(sequence.tokens, prompt)
            if common > length:
                best, length = sequence, common
        return best, length

    def open(self, source: CachedSequence | None = None, length: int = 0) -> CachedSequence | None:
        """A new running sequence that starts with the first `length` tokens of `source`; `None` if no id is free."""
        if not self._free_ids:
            return None
        self._births += 1
        spans = tuple(span for span in source.spans if span[1] < length) if source else ()
        tokens = source.tokens[:length] if source else array("i")
        sequence = CachedSequence(self._free_ids.pop(), tokens, (*spans, (self._births, length)))
        if source:
            self._touch(source)
        self._sequences[sequence.id] = sequence
        return sequence

    def lowest(self) -> tuple[int | None, CachedSequence | None]:
        """The lowest id that nothing runs in, and what is retained there; no id if all run."""
        idle = {sequence.id: sequence for sequence in self._sequences.values() if not sequence.running}
        place = min([*self._free_ids, *idle], default=None)
        return place, None if place is None else idle.get(place)

    def open_at(self, place: int) -> CachedSequence:
        """A new, empty, running sequence under an id that is free."""
        self._free_ids.remove(place)
        self._free_ids.append(place)
        sequence = self.open()
        assert sequence is not None
        return sequence

    def highest(self) -> CachedSequence | None:
        """The running sequence with the highest id."""
        return max((it for it in self._sequences.values() if it.running), key=lambda it: it.id, default=None)

    def move(self, sequence: CachedSequence, place: int) -> None:
        """Give a sequence another id, which is free; its own is free then."""
        self._free_ids.remove(place)
        del self._sequences[sequence.id]
        self._free_ids.append(sequence.id)
        sequence.id = place
        self._sequences[place] = sequence

    def resume(self, sequence: CachedSequence, length: int) -> None:
        """Run a retained sequence again, cut to its first `length` tokens."""
        del sequence.tokens[length:]
        sequence.running = True
        self._touch(sequence)

    def retain(self, sequence: CachedSequence) -> list[CachedSequence]:
        """Keep a sequence that no longer runs, and give the retained ones that it makes superfluous, dropped."""
        sequence.running = False
        self._touch(sequence)
        covered = [
            other
            for other in self._sequences.values()
            if not other.running
            and other is not sequence
            and common_prefix(other.tokens, sequence.tokens) == other.length
        ]
        for other in covered:
            self.drop(other)
        return covered

    def evict(self, but: CachedSequence | None = None) -> CachedSequence | None:
        """Drop the retained sequence that was used least recently, but for one; `None` if there is none."""
        for sequence in self._sequences.values():
            if not sequence.running and sequence is not but:
                self.drop(sequence)
                return sequence
        return None

    def drop(self, sequence: CachedSequence) -> None:
        """Forget a sequence; its id is free again."""
        del self._sequences[sequence.id]
        self._free_ids.append(sequence.id)

    def clear(self) -> None:
        """Forget everything."""
        for sequence in list(self._sequences.values()):
            self.drop(sequence)

    @property
    def used(self) -> int:
        """Cells in use; shared ones count once."""
        return _cells(list(self._sequences.values()))

    @property
    def idle(self) -> int:
        """Cells that only retained sequences use."""
        sequences = list(self._sequences.values())
        return _cells(sequences) - _cells([sequence for sequence in sequences if sequence.running])

    def _touch(self, sequence: CachedSequence) -> None:
        self._sequences[sequence.id] = self._sequences.pop(sequence.id)


def _cells(sequences: list[CachedSequence]) -> int:
    """Cells that some sequences use together: the holders of a span all hold it from its start on."""
    ends: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        stops = [start for _, start in sequence.spans[1:]] + [sequence.length]
        for span, stop in zip(sequence.spans, stops, strict=True):
            ends[span] = max(ends.get(span, span[1]), stop)
    return sum(end - start for (_, start), end in ends.items())


def common_prefix(left: array[int], right: array[int]) -> int:
    """How many tokens two sequences have in common at their start.

    >>> common_prefix(array("i", [1, 2, 3]), array("i", [1, 2, 4, 5]))
    2
    """
    length = min(len(left), len(right))
    if not length or left[0] != right[0]:
        return 0
    # array('i') may not grow while a view is on it: the views end with this function.
    differ = np.frombuffer(left, np.int32, length) != np.frombuffer(right, np.int32, length)
    first = int(differ.argmax())
    return first if differ[first] else length


def token_array(token_ids: Iterable[int] | Sequence[int]) -> array[int]:
    """Token ids as the compact array that this file compares (32-bit)."""
    return array("i", token_ids)
