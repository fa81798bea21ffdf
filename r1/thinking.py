"""One state machine a request: what it thinks, what it answers, in what form, and when thinking has to end.

It is the request's steer (see `backends/base.py`; it fits that protocol without importing it) and runs in the engine's
thread: budget, reserve, forced `</think>`, minimum thinking, loop breaker, stop strings, the split and the form of the
answer are all here, the same for every backend. Knows nothing of JSON, of the runtime, or of how the prompt was
written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .grammar import Bits, Matcher
from .loops import LoopDetector
from .messages import Channel, ClosedBy, Delta
from .prompt import CLOSE, OPEN
from .split import Splitter, State
from .stop import StopStrings

CLOSING_PHRASE = "\n\nI have thought about this long enough; it is time to give the final answer.\n"
"""In R1's own voice: after a bare `</think>` it tends to go on thinking inside the answer."""

_SENTENCE_ENDS = (".", "!", "?", "\n", "。", "！", "？")
_PHRASES_IN_ROOM = 6  # a reply with room for fewer closing phrases goes without
_MOST_NEWLINES = 2  # tokens of nothing but newlines between the thoughts and an answer that has a form
_LIKELY = 3.0  # in the soft window `</think>` is taken if its logit is so near the best (a twentieth as likely)


@dataclass(frozen=True, slots=True)
class Tags:
    """The thinking tags of a vocabulary; `None` where it has no token for one (they are matched as text then)."""

    open_id: int | None
    close_id: int | None
    end_ids: frozenset[int]
    vocabulary_size: int
    phrase_ids: tuple[int, ...]  # the closing phrase
    close_ids: tuple[int, ...]  # the closing tag and what follows it: `</think>\n\n`

    @classmethod
    def of(
        cls, control: dict[str, int], end_ids: frozenset[int], vocabulary_size: int, encode: Callable[[str], list[int]]
    ) -> Tags:
        """Look the tags up. Where `</think>` is a token it must be encoded as that one token."""
        return cls(
            control.get(OPEN),
            control.get(CLOSE),
            end_ids,
            vocabulary_size,
            tuple(encode(CLOSING_PHRASE)),
            tuple(encode(f"{CLOSE}\n\n")),
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request wants of its thoughts. Counts are tokens."""

    budget: int | None = None  # thoughts are closed at this many
    reserve: int | None = None  # kept free for the answer; None = a default share of the room
    min_tokens: int = 0  # the thoughts may not end before
    guard_bypass: bool = False  # thoughts may not be empty
    break_loops: bool = True
    want_answer: bool = True  # thoughts that end the reply are closed, and an answer is not empty
    inline: bool = False  # give the text as it comes, tags and all
    stops: tuple[str, ...] = ()
    stop_scope: Literal["answer", "all"] = "answer"
    penalty_scope: Literal["answer", "all"] = "answer"  # whether penalties on the answer count the thoughts


class Outcome(NamedTuple):
    """What became of a reply; told with its last token."""

    reasoning_tokens: int
    closed_by: ClosedBy | None  # None where nothing was thought
    stop: str | None  # the stop string that ended it


class Note(NamedTuple):
    """What one token means to a reader."""

    deltas: Sequence[Delta]
    channel: Channel  # that the token belongs to
    outcome: Outcome | None = None


Finish = Literal["stop", "length"]


@dataclass(slots=True)
class _Count:
    thinking: int = 0  # tokens
    blank_thought: bool = True  # nothing but white space so far
    blank_answer: bool = True


@dataclass(slots=True)
class Thinking:
    """The steer of one request. `room` is what the reply may have at most: `max_tokens`, or what the context leaves."""

    tags: Tags
    rules: Rules
    room: int
    state: State
    force: Callable[[tuple[int, ...]], Any]  # the backends' `Force` and `Only`, handed in so that imports run down only
    only: Callable[[NDArray[np.uint32]], Any]
    grammar: Matcher | None = None  # the form that the answer is held to
    forget: Any = None  # their `Forget`, too; None = penalties count on
    _splitter: Splitter = field(init=False)
    _stops: dict[Channel, StopStrings] = field(init=False)
    _loops: LoopDetector | None = field(init=False)
    _count: _Count = field(init=False, default_factory=_Count)
    _closing: ClosedBy | None = field(init=False, default=None)  # why the thoughts are being closed by force
    _closed_by: ClosedBy | None = field(init=False, default=None)
    _asked_to_end: bool = field(init=False, default=False)
    _sentence_ended: bool = field(init=False, default=False)
    _inside_character: bool = field(init=False, default=False)
    _looping: bool = field(init=False, default=False)
    _resume_at_end: bool = field(init=False, default=False)
    _forgot: bool = field(init=False, default=False)
    _newlines: int = field(init=False, default=0)  # tokens of these that may still come before the answer's form
    _form_begun: bool = field(init=False, default=False)
    _told: Matcher | None = field(init=False, default=None)  # the same form, as far as stop strings let the text out

    def __post_init__(self) -> None:
        if self.grammar and self.state == "undecided" and self.tags.open_id is None:
            self.state = "answering"  # a text that may be a tag or not can't be held to a form
        self._newlines = 0 if self.state == "answering" else _MOST_NEWLINES
        self._splitter = Splitter(self.state)
        self._told = self.grammar.copy() if self.grammar and self.rules.stops else None
        scoped = self.rules.stops if self.rules.stop_scope == "all" else ()
        self._stops = {
            "answer": StopStrings(self.rules.stops, self._may_stop),
            "reasoning": StopStrings(scoped),
        }
        self._loops = LoopDetector() if self.rules.break_loops else None

    @property
    def reserve(self) -> int:
        """Tokens kept free for the answer: as asked for, or 256 or 15 % of the room, but never over half of it.

        An answer that has a form gets what its shortest text needs, all of the room if it must be.
        """
        asked = self.rules.reserve
        if asked is None:
            asked = min(max(256, self.room * 15 // 100), self.room // 2)
        return min(max(asked, self._least_answer), max(0, self.room - 1))

    @property
    def _least_answer(self) -> int:
        return self.grammar.form.least_tokens if self.grammar else 0

    @property
    def limit(self) -> tuple[int, ClosedBy]:
        """Where the thoughts are closed at the latest, in tokens, and for what reason."""
        spare = max(0, self.room - self.reserve - len(self._closing_ids))
        budget = self.rules.budget
        return (budget, "budget") if budget is not None and budget <= spare else (spare, "reserve")

    @property
    def _closing_ids(self) -> tuple[int, ...]:
        """What closes the thoughts by force. In a very short reply the phrase would take the answer's place."""
        whole = self.tags.phrase_ids + self.tags.close_ids
        fits = self.room >= max(_PHRASES_IN_ROOM * len(whole), self._least_answer + len(whole))
        return whole if fits else self.tags.close_ids

    def end_thinking(self) -> bool:
        """Close the thoughts at the next token. May be called from any thread; false if there is nothing to close."""
        if self._splitter.state == "answering":
            return False
        self._asked_to_end = True
        return True

    # The steer

    def wish(self, logits: Callable[[], NDArray[np.float32]]) -> Any:
        """Before a token is drawn: nothing, or the tokens that close the thoughts, or all but those that would."""
        if self._splitter.state != "thinking":
            if self._count.thinking and not self._forgot and self.rules.penalty_scope == "answer":
                self._forgot = True
                if self.forget is not None:
                    return self.forget
            if self.grammar:
                bits = self._formed(self.grammar)
                return None if self.grammar.is_broken else self.only(bits)
            wanting = self.rules.want_answer and self._count.thinking and self._count.blank_answer
            return self._forbid_closing() if wanting and self._splitter.state == "answering" else None
        reason = self._reason_to_close(logits)
        if reason and not self._inside_character:
            self._closing = reason[0]
            return self.force(self.tags.close_ids if reason[1] else self._closing_ids)
        too_short = self._count.thinking < self.rules.min_tokens
        if too_short or (self.rules.guard_bypass and self._count.blank_thought):
            return self._forbid_closing()
        if self.grammar and self.tags.close_id is None and (half := self._splitter.half_tag):
            return self.only(self.grammar.form.tokens.never_glued(CLOSE[half:]))
        return None

    def see(self, token_id: int, text: str, finish: Finish | None) -> tuple[Note, Finish | None]:
        """After a token is drawn: split its text, watch for stop strings and loops, and decide whether to end."""
        was = self._splitter.state
        if finish == "stop" and was == "thinking" and self.rules.want_answer:
            self._resume_at_end = True
            return Note((), "reasoning"), None
        if self.grammar and was != "thinking":
            finish = self._follow_form(self.grammar, token_id, finish)
            text = "" if self.grammar.is_broken else text or self.grammar.form.marks.get(token_id, "")
        self._inside_character = text == "" and finish is None and token_id not in self.tags.end_ids
        deltas = self._split(token_id, text)
        now = self._splitter.state
        channel: Channel = "reasoning" if was == "thinking" or now == "thinking" else "answer"
        if channel == "reasoning":
            self._think(token_id, text, now)
        if finish:
            deltas = [*deltas, *self._splitter.finish()]
        if self._count.blank_answer and now == "answering":
            self._count.blank_answer = not any(d.channel == "answer" and d.text.strip() for d in deltas)
        if self.rules.inline:
            deltas = self._raw(token_id, text, channel)
        stopped = self._cut_at_stop(deltas, finish is not None)
        if self._hit is not None:
            finish = "stop"
        if finish is None:
            return Note(stopped, channel), None
        return Note(stopped, channel, self._outcome(finish)), finish

    # Its parts

    def _formed(self, grammar: Matcher) -> Bits:
        """What an answer's form allows next; before it begins also newlines, and thoughts where none have begun."""
        bits = grammar.mask()
        if self._newlines:
            bits = bits | grammar.form.tokens.newlines[1]
        if self._splitter.state == "undecided" and self.tags.open_id is not None:
            bits[self.tags.open_id // 32] |= np.uint32(1 << self.tags.open_id % 32)
        return bits

    def _follow_form(self, grammar: Matcher, token_id: int, finish: Finish | None) -> Finish | None:
        """Move the form on by one token of the answer, and tell whether the reply ends with it."""
        if grammar.is_broken:
            return "length"  # cut short is what it is
        if token_id in self.tags.end_ids:
            return finish
        if self._splitter.state == "undecided" and token_id == self.tags.open_id:
            return finish
        if self._newlines and token_id in grammar.form.tokens.newlines[0]:
            self._newlines -= 1
            return finish
        if not self._form_begun:
            self._form_begun, self._newlines = True, 0
            self._splitter.answer()
        grammar.take(token_id)
        if grammar.is_broken:
            return "length"
        return "stop" if grammar.is_complete else finish

    def _may_stop(self, before: str) -> bool:
        """Whether a stop string may end the answer behind `before`: one that has a form must be whole then."""
        if self._told is None:
            return True
        told = self._told.copy()
        return told.take_text(before) and told.may_end

    def _reason_to_close(self, logits: Callable[[], NDArray[np.float32]]) -> tuple[ClosedBy, bool] | None:
        """Why the thoughts must end before the next token, and whether the model wants that itself (no phrase then)."""
        if self._resume_at_end:
            return "eos", True
        if self._asked_to_end:
            return "user", False
        if self._looping:
            return "loop", False
        thought = self._count.thinking
        limit, reason = self.limit
        if thought >= limit:
            return reason, False
        window = min(128, limit // 8)
        if thought >= limit - window and thought >= self.rules.min_tokens:
            if self._sentence_ended:
                return reason, False
            if self.tags.close_id is not None:
                row = logits()
                if row[self.tags.close_id] >= row.max() - _LIKELY:
                    return reason, True
        return None

    def _forbid_closing(self) -> Any:
        banned = self.tags.end_ids | ({self.tags.close_id} if self.tags.close_id is not None else frozenset())
        return self.only(_all_but(self.tags.vocabulary_size, banned))

    def _split(self, token_id: int, text: str) -> list[Delta]:
        if token_id == self.tags.close_id:
            return self._splitter.close()
        if token_id == self.tags.open_id:
            return self._splitter.open()
        return self._splitter.add(text)

    def _raw(self, token_id: int, text: str, channel: Channel) -> list[Delta]:
        """A token's own text; a tag that the vocabulary hides is written out."""
        text = text or {self.tags.open_id: OPEN, self.tags.close_id: CLOSE}.get(token_id, "")
        return [Delta(channel, text)] if text else []

    def _think(self, token_id: int, text: str, now: State) -> None:
        self._count.thinking += 1
        if text and token_id != self.tags.open_id:
            self._count.blank_thought = self._count.blank_thought and not text.strip()
            self._sentence_ended = text.rstrip(" ").endswith(_SENTENCE_ENDS)
        if now == "answering":
            self._closed_by = self._closing or "model"
        elif self._loops and self._closing is None:
            self._looping = self._looping or self._loops.add(token_id, text)

    def _cut_at_stop(self, deltas: Sequence[Delta], ending: bool) -> Sequence[Delta]:
        if not self.rules.stops:
            return deltas
        kept: list[Delta] = []
        for delta in deltas:
            if delta.channel == "answer" and (text := self._stops["reasoning"].finish()):
                kept.append(Delta("reasoning", text))  # the thoughts are over: half a stop string was only text
            if self._hit is None and (text := self._stops[delta.channel].add(delta.text)):
                kept.append(Delta(delta.channel, text))
                if self._told and delta.channel == "answer":
                    self._told.take_text(text)
        if ending and self._hit is None:
            for channel in ("reasoning", "answer"):
                if text := self._stops[channel].finish():
                    kept.append(Delta(channel, text))
        return kept

    @property
    def _hit(self) -> str | None:
        return self._stops["answer"].hit or self._stops["reasoning"].hit

    def _outcome(self, finish: Finish) -> Outcome:
        closed_by = self._closed_by
        if closed_by is None and self._count.thinking:
            closed_by = "stop" if self._hit is not None else "length" if finish == "length" else "eos"
        return Outcome(self._count.thinking, closed_by, self._hit)


@lru_cache(maxsize=16)
def _all_but(size: int, banned: frozenset[int]) -> NDArray[np.uint32]:
    """A bit mask over a vocabulary with every bit set but those of `banned`: uint32, ceil(size / 32)."""
    allowed = np.ones(-(-size // 32) * 32, dtype=np.uint8)
    allowed[list(banned)] = 0
    return np.packbits(allowed, bitorder="little").view(np.uint32)
