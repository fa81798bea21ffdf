"""Thoughts from answer: text in, deltas out, the same however the text is cut. Knows nothing of tokens or budgets.

States: *undecided* (a reply that may open with `<think>`), *thinking*, *answering*. It never goes back: what follows
the first `</think>` is the answer, word for word.
"""

from __future__ import annotations

from typing import Literal

from .messages import Delta
from .prompt import CLOSE, OPEN

State = Literal["undecided", "thinking", "answering"]


class Splitter:
    """Splits one reply. What might still become a tag, or white space before one, is held back until it is clear."""

    __slots__ = ("_at_start", "_held", "state")

    def __init__(self, state: State) -> None:
        self.state: State = state
        self._held = ""
        self._at_start = state != "answering"  # of the thoughts, or of an answer after thoughts: newlines are not text

    def add(self, text: str) -> list[Delta]:
        """Take the next piece of the reply; give what has become clear."""
        if not text:
            return []
        if self.state == "answering":
            return self._answer(text)
        text, self._held = self._held + text, ""
        if self.state == "undecided":
            start = text.lstrip()
            if OPEN.startswith(start) and start != OPEN:  # nothing but white space and perhaps half a tag
                self._held = text
                return []
            if not start.startswith(OPEN):
                self.state, self._at_start = "answering", False
                return [Delta("answer", text)]
            self.state, text = "thinking", start.removeprefix(OPEN)
        return self._think(text)

    def open(self) -> list[Delta]:
        """Take an opening tag that came as a token of its own."""
        return self.add(OPEN)

    def close(self) -> list[Delta]:
        """Take a closing tag that came as a token of its own."""
        return self.add(CLOSE)

    def answer(self) -> None:
        """Take note that what comes now is the answer, word for word, whatever it looks like."""
        self.state, self._held, self._at_start = "answering", "", False

    @property
    def half_tag(self) -> int:
        """How many characters of a closing tag may have come already."""
        return overlap(self._held, CLOSE)

    def finish(self) -> list[Delta]:
        """Give what was held back: the reply ends here, and half a tag was only text."""
        held = self._take_held()
        if not held:
            return []
        if self.state == "thinking":
            return _reasoning(held.lstrip("\n") if self._at_start else held)
        self.state = "answering"
        return [Delta("answer", held)]

    def _think(self, text: str) -> list[Delta]:
        if self._at_start:
            text = text.lstrip("\n")
            start = text.lstrip()
            if OPEN.startswith(start) and start != OPEN:  # a second opener, perhaps: not text here
                self._held = text
                return []
            if start.startswith(OPEN):
                return self._think(start.removeprefix(OPEN))
        thought, closed, answer = text.partition(CLOSE)
        if closed:
            deltas = _reasoning(thought.rstrip())
            self.state, self._at_start = "answering", True
            return deltas + (self._answer(answer) if answer else [])
        clear = len(text) - overlap(text, CLOSE)
        clear = len(text[:clear].rstrip())  # white space before a closing tag is not text
        self._held = text[clear:]
        if clear:
            self._at_start = False
        return _reasoning(text[:clear])

    def _answer(self, text: str) -> list[Delta]:
        if self._at_start:
            text = text.lstrip("\n")
            self._at_start = not text
        return [Delta("answer", text)] if text else []

    def _take_held(self) -> str:
        held, self._held = self._held, ""
        return held


def overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` could be the start of `tag`.

    >>> overlap("so </th", "</think>")
    4
    """
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


def _reasoning(text: str) -> list[Delta]:
    return [Delta("reasoning", text)] if text else []
