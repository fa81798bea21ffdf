"""Sequences in RAM are found by their beginning, whatever their number, and go in order of last use."""

from __future__ import annotations

import random
from array import array

import pytest

from stillhouse.backends.kvcache import common_prefix
from stillhouse.backends.prefixstore import PrefixStore, Stored


def tokens(*ids: int) -> array[int]:
    return array("i", ids)


def keep(store: PrefixStore, *ids: int, size: int = 10) -> None:
    store.put(tokens(*ids), lambda: bytes(size))


def entries(store: PrefixStore) -> list[Stored]:
    return list(store._entries.values())


def test_the_longest_prefix_is_the_one_that_a_look_at_all_of_them_finds():
    """Ids beyond a byte on purpose: their bytes are not in the numbers' order."""
    draw = random.Random(0)
    store = PrefixStore(1 << 20)
    few = [0, 1, 255, 256, 65_536, 150_000]
    for _ in range(300):
        keep(store, *draw.choices(few, k=draw.randint(1, 6)))
    for _ in range(1000):
        prompt = tokens(*draw.choices(few, k=draw.randint(1, 8)))
        found, length = store.longest_prefix(prompt)
        assert length == max(common_prefix(entry.tokens, prompt) for entry in entries(store))
        assert found is None or common_prefix(found.tokens, prompt) == length


def test_no_entry_begins_with_another():
    draw = random.Random(1)
    store = PrefixStore(1 << 20)
    for _ in range(300):
        keep(store, *draw.choices([7, 256, 9000], k=draw.randint(1, 6)))
    kept = [entry.tokens for entry in entries(store)]
    assert all(common_prefix(a, b) < len(a) for a in kept for b in kept if a is not b)
    assert store.size == 10 * len(kept)


def test_what_a_stored_sequence_begins_with_is_not_even_saved():
    store = PrefixStore(100)
    keep(store, 1, 2, 3)
    store.put(tokens(1, 2), lambda: pytest.fail("it was copied for nothing"))
    assert [entry.tokens for entry in entries(store)] == [tokens(1, 2, 3)]


def test_a_store_of_no_bytes_saves_nothing():
    store = PrefixStore(0)
    store.put(tokens(1, 2), lambda: pytest.fail("it was copied for nothing"))
    assert not list(entries(store))


@pytest.mark.parametrize("touched", [False, True])
def test_the_least_recently_used_goes_first(touched):
    store = PrefixStore(25)
    keep(store, 1)
    keep(store, 2)
    if touched:
        found, _ = store.longest_prefix(tokens(1, 5))
        assert found is not None
        store.touch(found)
    keep(store, 3)
    assert {entry.tokens[0] for entry in entries(store)} == ({1, 3} if touched else {2, 3})


def test_one_that_is_larger_than_the_whole_store_is_left_out():
    store = PrefixStore(25)
    keep(store, 1)
    keep(store, 2, size=26)
    assert [entry.tokens for entry in entries(store)] == [tokens(1)]
    assert store.longest_prefix(tokens(2)) == (None, 0)
