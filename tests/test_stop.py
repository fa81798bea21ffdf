"""A stop string ends a text before its first character, wherever the text is cut; nothing else is withheld."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.r1.stop import StopStrings

TEXTS: dict[str, tuple[tuple[str, ...], str, str, str | None]] = {  # stops, text, what is given, the stop that was hit
    "no stop strings": ((), "four.", "four.", None),
    "none in the text": (("END",), "four EN", "four EN", None),
    "in the middle": (("END",), "four END five", "four ", "END"),
    "at the start": (("END",), "END five", "", "END"),
    "at the end": (("END",), "fourEND", "four", "END"),
    "one of a few": (("\n\n", "END"), "four\nfive\n\nEND", "four\nfive", "\n\n"),
    "begun twice": (("aab",), "aaab", "a", "aab"),
    "overlapping itself": (("abab",), "aababab", "a", "abab"),
    "one inside another": (("xabcd", "bc"), "xabcd", "xa", "bc"),
    "one at the end of another": (("abcd", "cd"), "abcd", "", "abcd"),
    "one at the start of another": (("ab", "abcd"), "abcd", "", "ab"),
    "whole characters": (("停",), "一停止", "一", "停"),
    "a newline": (("\n",), "four\n", "four", "\n"),
}


def watch(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    watcher = StopStrings(stops)
    given = "".join([*map(watcher.add, pieces), watcher.finish()])
    return given, watcher.hit


@pytest.mark.parametrize(("stops", "text", "given", "hit"), TEXTS.values(), ids=TEXTS)
def test_every_cut_stops_at_the_same_place(stops, text, given, hit):
    """Of two stop strings, one inside the other, the text in one piece hit the outer and cut in two the inner."""
    for first, second in combinations(range(len(text) + 1), 2):
        assert watch(stops, [text[:first], text[first:second], text[second:]]) == (given, hit)
    assert watch(stops, [text]) == (given, hit)


@given(stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), pieces=st.lists(st.text("abc", max_size=5)))
def test_what_is_given_is_the_text_up_to_the_first_stop_string(stops, pieces):
    text = "".join(pieces)
    given, hit = watch(tuple(stops), pieces)
    assert (given, hit) == watch(tuple(stops), list(text))
    assert text.startswith(given + (hit or ""))
    assert given == text if hit is None else True
    assert not any(stop in given for stop in stops)


def test_only_what_may_begin_a_stop_string_is_held_back():
    watcher = StopStrings(("</s>", "\n\n"))
    assert [watcher.add(piece) for piece in ("four<", "/", "b>\n", "five")] == ["four", "", "</b>", "\nfive"]


def test_after_a_hit_nothing_is_given():
    watcher = StopStrings(("END",))
    assert [watcher.add("fourEND five"), watcher.add("six"), watcher.finish()] == ["four", "", ""]
