"""The book of the KV cache agrees with a plain model of it, in which every cell is a thing that sequences hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stillhouse.backends.kvcache import CachedSequence, KVCache, common_prefix, token_array

SEQUENCES = 5


@dataclass(eq=False)
class Plain:
    """A sequence of the model: cells are held one by one, and each knows its token."""

    cells: list[tuple[object, int]] = field(default_factory=list)  # (a cell like no other, its token)
    running: bool = True

    @property
    def tokens(self) -> list[int]:
        return [token for _, token in self.cells]


def shared(left: list[int], right: list[int]) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


class Cells(RuleBasedStateMachine):
    """Does as a backend does, in any order; of few different tokens, so that much is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(SEQUENCES, 1000)
        self.plain: dict[CachedSequence, Plain] = {}  # in order of last use

    @rule(prompt=st.lists(st.integers(0, 1), max_size=8), spare=st.integers(0, 2))
    def admit(self, prompt: list[int], spare: int) -> None:
        """A prompt copies the longest prefix there is, or some tokens less of it."""
        source, length = self.cache.longest_prefix(token_array(prompt))
        lengths = [shared(plain.tokens, prompt) for plain in self.plain.values()]
        assert length == max(lengths, default=0)
        assert (source is None) == (length == 0)
        assert source is None or shared(self.plain[source].tokens, prompt) == length
        length = max(0, length - spare)
        opened = self.cache.open(source, length)
        if len(self.plain) == SEQUENCES:
            assert opened is None
            return
        assert opened is not None
        cells = self.plain[source].cells[:length] if source else []
        if source:
            self.touch(source)
        self.plain[opened] = Plain(list(cells))
        self.write(opened, prompt[length:])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def reply(self, data: st.DataObject, tokens: list[int]) -> None:
        self.write(data.draw(st.sampled_from(self.running)), tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        """What a retained sequence holds to the last token makes a retained one superfluous."""
        sequence = data.draw(st.sampled_from(self.running))
        self.plain[sequence].running = False
        self.touch(sequence)
        whole = self.plain[sequence].tokens
        superfluous = [
            other
            for other, plain in self.plain.items()
            if other is not sequence and not plain.running and whole[: len(plain.cells)] == plain.tokens
        ]
        assert self.cache.retain(sequence) == superfluous
        for other in superfluous:
            del self.plain[other]

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """The one that was written or copied from longest ago goes; one may be spared."""
        spared = data.draw(st.sampled_from([None, *self.plain]))
        oldest = next((s for s, plain in self.plain.items() if not plain.running and s is not spared), None)
        assert self.cache.evict(but=spared) is oldest
        if oldest:
            del self.plain[oldest]

    @precondition(lambda self: self.plain)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(list(self.plain)))
        self.cache.drop(sequence)
        del self.plain[sequence]

    @precondition(lambda self: self.running and len(self.plain) < SEQUENCES)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """Into any place that is free; what it holds stays the same, and its own place is free."""
        sequence = data.draw(st.sampled_from(self.running))
        place = data.draw(st.sampled_from(sorted(set(range(SEQUENCES)) - {it.id for it in self.plain})))
        self.cache.move(sequence, place)
        self.touch(sequence)
        assert sequence.id == place

    @invariant()
    def places_are_told(self) -> None:
        """The lowest that nothing runs in, with what is retained there, and the highest that something runs in."""
        here = {it.id: it for it in self.plain}
        idle = [n for n in range(SEQUENCES) if n not in here or not here[n].running]
        assert self.cache.lowest() == ((idle[0], here.get(idle[0])) if idle else (None, None))
        assert self.cache.highest() is max(self.running, key=lambda it: it.id, default=None)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.plain.clear()

    @invariant()
    def the_books_agree(self) -> None:
        assert list(self.cache) == list(self.plain)
        assert [list(s.tokens) for s in self.cache] == [plain.tokens for plain in self.plain.values()]
        assert [s.running for s in self.cache] == [plain.running for plain in self.plain.values()]
        assert len({s.id for s in self.cache}) == len(self.plain)
        assert all(0 <= s.id < SEQUENCES for s in self.cache)

    @invariant()
    def a_shared_cell_counts_once(self) -> None:
        assert self.cache.used == len({cell for plain in self.plain.values() for cell, _ in plain.cells})

    @property
    def running(self) -> list[CachedSequence]:
        return [sequence for sequence, plain in self.plain.items() if plain.running]

    def write(self, sequence: CachedSequence, tokens: list[int]) -> None:
        sequence.tokens.extend(tokens)
        self.plain[sequence].cells += [(object(), token) for token in tokens]

    def touch(self, sequence: CachedSequence) -> None:
        self.plain[sequence] = self.plain.pop(sequence)


TestCells = Cells.TestCase


def test_a_prefix_is_as_long_as_what_is_equal():
    cases = [([], []), ([1], []), ([1, 2, 3], [1, 2, 3]), ([1, 2, 3], [1, 2, 4, 5]), ([2], [1]), ([1, 2], [1, 2, 3])]
    found = [common_prefix(token_array(left), token_array(right)) for left, right in cases]
    assert found == [0, 0, 3, 2, 0, 2]


def test_what_was_last_read_from_goes_last():
    cache = KVCache(8, 100)
    first, second = cache.open(), cache.open()
    assert first and second
    first.tokens.extend([1, 2])
    second.tokens.extend([3, 4])
    cache.retain(first)
    cache.retain(second)
    copy = cache.open(first, 2)
    assert copy
    assert [cache.evict(), cache.evict(), cache.evict()] == [second, first, None]
