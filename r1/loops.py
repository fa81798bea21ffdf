"""Does a train of thought go in circles? Told from its tokens and sentences; knows nothing of what to do about it."""

from __future__ import annotations

import re
from array import array
from collections import Counter, deque

import numpy as np

_EVERY = 16  # tokens between two looks for a period
_LONGEST_PERIOD = 256  # tokens
_REPEATS = 3
_SHORTEST_SPAN = 48  # tokens: a ruler of dashes or a row of zeros is no loop yet
_SENTENCES = 48  # remembered
_LONGEST_SENTENCE = 1000  # characters: of a longer one, a table say, the end
_SAME_SENTENCES = 5  # so many of them with the same words: it argues in circles
_SENTENCE_END = re.compile(r"[.!?]\s|[。！？\n]")
_IDEOGRAPHS = "\u3040-\u30ff\u4e00-\u9fff"  # no spaces between words: each counts as one
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[-+*/^<>=×÷]")

Words = tuple[frozenset[str], tuple[str, ...]]
"""What two sentences that say the same have in common: their words, and in this order names, numbers and signs."""


class LoopDetector:
    """Watches the tokens of one train of thought."""

    __slots__ = ("_counts", "_ids", "_sentence", "_sentences")

    def __init__(self) -> None:
        self._ids = array("i")
        self._sentence = ""
        self._sentences: deque[Words] = deque()
        self._counts: Counter[Words] = Counter()

    def add(self, token_id: int, text: str) -> bool:
        """Take the next token; true once the thoughts repeat themselves.

        Either the last tokens have a period of at most 256, three times over and 48 tokens long, or five of the last
        48 sentences are made of the same words (of six or more; in any order, so that a rephrasing counts, but for
        names, numbers and signs: trying "A, B, C" and then "C, B, A" is no loop).
        """
        self._ids.append(token_id)
        if len(self._ids) % _EVERY == 0 and has_period(self._ids):
            return True
        # A sentence's full stop and the space after it come in different tokens.
        seen = max(0, min(len(self._sentence), _LONGEST_SENTENCE) - 1)
        self._sentence = self._sentence[-_LONGEST_SENTENCE:] + text
        looping = False
        while end := _SENTENCE_END.search(self._sentence, seen):
            sentence, self._sentence, seen = self._sentence[: end.end()], self._sentence[end.end() :], 0
            looping = self._end_sentence(sentence[-_LONGEST_SENTENCE:]) or looping
        return looping

    def _end_sentence(self, sentence: str) -> bool:
        in_order = _WORD.findall(sentence)
        bag = frozenset(word.lower() for word in in_order if word[0].isalnum())
        if len(bag) < 6:
            return False
        # The first word may be large or small.
        words = bag, tuple(word for word in in_order[1:] if not word.islower() or len(word) == 1)
        self._sentences.append(words)
        self._counts[words] += 1
        if len(self._sentences) > _SENTENCES:
            oldest = self._sentences.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        return self._counts[words] >= _SAME_SENTENCES


def has_period(ids: array[int]) -> bool:
    """Whether the last tokens repeat with some period, three times over and at least 48 tokens long.

    >>> has_period(array("i", [1, 2, 3, 4, 5, 6, 7, 8] * 6)), has_period(array("i", range(100)))
    (True, False)
    """
    tail = np.frombuffer(ids, np.int32)[-_LONGEST_PERIOD * _REPEATS :]
    recent = tail[-_LONGEST_PERIOD - 1 : -1]
    # Candidates: the distances at which the last token was seen before.
    for period in (len(recent) - np.flatnonzero(recent == tail[-1])[::-1]).tolist():
        span = max(period * (_REPEATS - 1), _SHORTEST_SPAN - period)
        if span + period <= len(tail) and np.array_equal(tail[-span:], tail[-span - period : -period]):
            return True
    return False
