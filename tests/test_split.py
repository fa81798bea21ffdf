"""Thoughts and answer come apart in the same way however a reply is cut, and nothing of it is lost."""

from __future__ import annotations

import re
import time
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.r1.messages import Delta
from stillhouse.r1.prompt import CLOSE, OPEN
from stillhouse.r1.split import Splitter, State

REPLIES: dict[str, tuple[State, str, str, str]] = {  # state at the start, reply, thoughts, answer
    "nothing": ("thinking", "", "", ""),
    "thoughts and answer": ("thinking", "2+2 is 4\n</think>\n\nfour", "2+2 is 4", "four"),
    "newlines at both starts": ("thinking", "\n\nso\n</think>\n\n\n4\n", "so", "4\n"),
    "spaces are text at the start": ("thinking", "  so</think>\n  4", "  so", "  4"),
    "no thoughts": ("thinking", "\n\n</think>\n\n4", "", "4"),
    "blank thoughts": ("thinking", "  \n</think>4", "", "4"),
    "no answer": ("thinking", "so</think>", "so", ""),
    "never closed": ("thinking", "so it is", "so it is", ""),
    "never closed, white space last": ("thinking", "so \n\n", "so \n\n", ""),
    "cut short in the closing tag": ("thinking", "2+2 </thin", "2+2 </thin", ""),
    "cut short in a second opener": ("thinking", "\n<thi", "<thi", ""),
    "a tag almost": ("thinking", "a </thin> b </ think> c </think>d", "a </thin> b </ think> c", "d"),
    "a tag begun twice": ("thinking", "a <</think>d", "a <", "d"),
    "a redundant opener": ("thinking", "<think>\nso</think>4", "so", "4"),
    "a redundant opener after newlines": ("thinking", "\n \n<think>\nso</think>4", "so", "4"),
    "two redundant openers": ("thinking", "<think>\n<think>so</think>4", "so", "4"),
    "an opener amid the thoughts": ("thinking", "so <think> hm</think>4", "so <think> hm", "4"),
    "tags in the answer": ("thinking", "so</think>`</think>` after <think>", "so", "`</think>` after <think>"),
    "a second close at once": ("thinking", "so</think></think>4", "so", "</think>4"),
    "undecided, nothing": ("undecided", "", "", ""),
    "undecided, an answer": ("undecided", "four\n", "", "four\n"),
    "undecided, white space first": ("undecided", "\n four", "", "\n four"),
    "undecided, only white space": ("undecided", " \n", "", " \n"),
    "undecided, thoughts": ("undecided", "\n<think>\nso</think>\n4", "so", "4"),
    "undecided, half an opener": ("undecided", "<thi", "", "<thi"),
    "undecided, almost an opener": ("undecided", "\n<thin>4", "", "\n<thin>4"),
    "undecided, a close alone": ("undecided", "\n</think>4", "", "\n</think>4"),
    "undecided, an opener later": ("undecided", "4<think>5</think>6", "", "4<think>5</think>6"),
    "answering": ("answering", "\n</think>4<think>", "", "\n</think>4<think>"),
    "large white space": ("thinking", "a\u3000\u2003\n</think>\u30004", "a", "\u30004"),
}
CASES = pytest.mark.parametrize(("state", "reply", "thoughts", "answer"), REPLIES.values(), ids=REPLIES)


def split(state: State, pieces: list[str]) -> tuple[str, str]:
    splitter = Splitter(state)
    return gathered([delta for piece in pieces for delta in splitter.add(piece)] + splitter.finish())


def split_tokens(state: State, pieces: list[str]) -> tuple[str, str]:
    """As `split`, where a piece that is a tag comes as the token of its own that it mostly is."""
    splitter = Splitter(state)
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += splitter.open() if piece == OPEN else splitter.close() if piece == CLOSE else splitter.add(piece)
    return gathered(deltas + splitter.finish())


def gathered(deltas: list[Delta]) -> tuple[str, str]:
    assert all(delta.text for delta in deltas)
    channels = [delta.channel for delta in deltas]
    assert channels == sorted(channels, reverse=True)  # thoughts never follow the answer
    joined = {channel: "".join(d.text for d in deltas if d.channel == channel) for channel in ("reasoning", "answer")}
    return joined["reasoning"], joined["answer"]


@CASES
def test_every_cut_gives_the_same_split(state, reply, thoughts, answer):
    for first, second in combinations(range(len(reply) + 1), 2):
        cut = [reply[:first], reply[first:second], reply[second:]]
        assert split(state, cut) == (thoughts, answer), cut
    assert split(state, [reply]) == (thoughts, answer)
    assert split(state, list(reply)) == (thoughts, answer)


@CASES
def test_a_tag_that_is_a_token_splits_as_its_text_does(state, reply, thoughts, answer):
    """A closing token in a reply that had not begun yet lost the white space before it, or gave it last."""
    tokens = [piece for piece in re.split(f"({OPEN}|{CLOSE})", reply) if piece]
    assert split_tokens(state, tokens) == (thoughts, answer)


PIECES = st.lists(st.sampled_from([OPEN, CLOSE, "<", "</", "</thi", "think>", "nk>", "\n", " ", "a", "b.", "é"]))
STATES = st.sampled_from(["undecided", "thinking", "answering"])


@given(state=STATES, pieces=PIECES, cuts=st.lists(st.integers(0, 60)))
def test_any_text_splits_the_same_at_random_cuts(state, pieces, cuts):
    reply = "".join(pieces)
    places = [0, *sorted(min(cut, len(reply)) for cut in cuts), len(reply)]
    whole = split(state, [reply])
    assert split(state, [reply[a:b] for a, b in pairwise(places)]) == whole
    assert split_tokens(state, pieces) == whole


@given(state=STATES, pieces=PIECES)
def test_nothing_is_lost_but_tags_and_white_space_around_them(state, pieces):
    reply = "".join(pieces)
    thoughts, answer = split(state, list(reply))
    shape = rf"\s*({OPEN}\s*)*{re.escape(thoughts)}\s*({CLOSE}\n*)?{re.escape(answer)}"
    assert re.fullmatch(shape, reply)


def test_what_is_clear_is_given_at_once():
    splitter, pieces = Splitter("thinking"), ("so ", "<", "b", " </th", "ink>\n", "\n4", "</")
    assert ["".join(d.text for d in splitter.add(piece)) for piece in pieces] == ["so", "", " <b", "", "", "4", "</"]


def test_a_train_of_thought_of_32k_tokens_takes_no_time():
    pieces = ["so ", "< ", "it is", "\n"] * 8192
    started = time.perf_counter()
    split("thinking", pieces)
    assert time.perf_counter() - started < 1
