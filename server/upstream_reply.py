"""What an upstream says -> the same tokens that the engine would give, looked over by the same steer.

An upstream's pieces of text stand for tokens. Where the steer wants the thoughts closed, the upstream's stream is cut,
and it is asked to go on behind the closing words. Knows nothing of queues, or of which upstream is asked.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..backends.base import FinishReason, Force, Started, Token
from ..r1.messages import CallDelta, Channel, ClosedBy, Delta
from ..r1.prompt import CLOSE, OPEN
from ..r1.thinking import Outcome, Tags, Thinking
from .upstream import Upstream, UpstreamFailed, choices_of

_LEAST_LEFT = 1  # tokens that an answer gets, however long the thoughts were
_ONLY_IN_CHAT = frozenset({"messages", "chat_template_kwargs", "tools", "tool_choice", "parallel_tool_calls"})
_words: dict[int, str] = {}  # the closing words, by the numbers that stand for them


def _number(piece: str) -> int:
    """What stands for the token id of a piece of text: the same piece, the same number."""
    return zlib.crc32(piece.encode(errors="surrogatepass")) & 0x7FFFFFFF


def _numbers(text: str) -> list[int]:
    pieces = re.findall(r"\s*\S+|\s+", text)
    _words.update((_number(piece), piece) for piece in pieces)
    return [_number(piece) for piece in pieces]


TAGS = Tags.of({}, frozenset(), 0, _numbers)
"""The thinking tags of a vocabulary that nobody here has: they are matched as text."""


class Counted(NamedTuple):
    """An upstream's own count of one reply's tokens."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Relayed(NamedTuple):
    """The note of a token that an upstream said: as the steer's, with what the upstream has worked out itself."""

    deltas: Sequence[Delta]
    channel: Channel
    outcome: Outcome | None = None
    calls: Sequence[CallDelta] = ()
    counted: Counted | None = None  # with the last one


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """One reply, as upstreams are asked for it."""

    id: str
    path: str
    body: Mapping[str, Any]
    steer: Thinking
    max_tokens: int | None
    prefix: Sequence[tuple[bytes, int]]  # the beginnings of its prompt, shortest first: (hash, characters)
    can_cut: bool  # whether its thoughts may be closed by force
    no_thoughts: bool  # they are closed before they begin


class _Said(NamedTuple):
    """What one choice of one event adds."""

    reasoning: str
    content: str
    calls: Sequence[CallDelta]
    finish: FinishReason | None
    closed_by: ClosedBy | None


@dataclass(slots=True)
class Relay:
    """One reply of one upstream, on its way."""

    upstream: Upstream
    request: UpstreamRequest
    queue_s: float
    _raw: str = ""  # what the steer was given
    _pieces: int = 0
    _pieces_before: int = 0  # this leg of it
    _in_reasoning: bool = False  # the upstream tells the thoughts apart, and is at them
    _has_answered: bool = False
    _wanted: Force | None = None  # the words that close the thoughts
    _prompt_tokens: int | None = None
    _usage: Mapping[str, Any] = field(default_factory=dict)
    _closed_by: ClosedBy | None = None
    _began: float = field(default_factory=time.monotonic)

    async def tokens(self) -> AsyncGenerator[Token, None]:
        """Yield what comes, up to a token with the reason to end. Raises `UpstreamFailed` where none comes."""
        path, body = self.request.path, self.request.body
        if self.request.no_thoughts:
            path, body = await self._without_thoughts()
        while True:
            async with aclosing(self._leg(path, body)) as leg:
                async for token in leg:
                    yield token
                    if token.finish:
                        return
            for token in self._close():  # leaving the leg has cut the upstream
                yield token
            path, body = await self._behind_the_thoughts()

    async def _leg(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Token, None]:
        """What comes from one request to the upstream, up to its end or to where the thoughts are to be closed."""
        steer, finish = self.request.steer, None
        async with aclosing(self.upstream.stream(path, body)) as events:
            async for event in events:
                if isinstance(usage := event.get("usage"), dict):
                    self._usage = usage
                for said in map(_said, choices_of(event)):
                    for text in self._as_r1_writes_it(said):
                        note, ended = steer.see(_number(text), text, None)
                        if ended:
                            yield self._token(Relayed(*note, counted=await self._counted()), ended)
                            return
                        yield self._token(Relayed(*note))
                        if self._is_to_be_closed():
                            return
                    if said.reasoning and self._has_answered:  # between two answers: nothing that a steer looks at
                        yield self._token(Relayed((Delta("reasoning", said.reasoning),), "reasoning"))
                    if said.calls:
                        yield self._token(Relayed((), "answer", calls=said.calls))
                    finish, self._closed_by = finish or said.finish, self._closed_by or said.closed_by
        if finish is None:
            raise UpstreamFailed(f"the upstream {self.upstream.name} broke off in mid-reply", is_down=True)
        note, ended = steer.see(_number(""), "", finish)
        if ended or not self._is_to_be_closed():
            outcome = note.outcome
            if outcome and self._closed_by:
                outcome = outcome._replace(closed_by=self._closed_by)
            counted = await self._counted()
            yield self._token(Relayed(note.deltas, note.channel, outcome, counted=counted), ended or finish)

    def _as_r1_writes_it(self, said: _Said) -> Iterator[str]:
        """The pieces of text with their tags, however the upstream tells thoughts apart, or does not."""
        if said.reasoning and not self._has_answered:
            tag = "" if self._in_reasoning else OPEN
            self._in_reasoning = True
            yield self._took(tag + said.reasoning)
        if said.content:
            tag = f"{CLOSE}\n\n" if self._in_reasoning else ""
            opens = self.upstream.traits is not None and self.upstream.traits.opens
            if not self._raw and opens and self.request.path.endswith("/chat/completions"):
                tag = "" if self.request.no_thoughts else OPEN
            self._has_answered = self._has_answered or self._in_reasoning
            self._in_reasoning = False
            yield self._took(tag + said.content)

    def _took(self, text: str) -> str:
        self._raw += text
        return text

    def _is_to_be_closed(self) -> bool:
        if self.request.can_cut and isinstance(wish := self.request.steer.wish(_no_logits), Force):
            self._wanted = wish
        return self._wanted is not None

    def _close(self) -> Iterator[Token]:
        """Say the closing words, as the engine does: each is seen by the steer."""
        assert self._wanted is not None
        for number in self._wanted.token_ids:
            note, _ = self.request.steer.see(number, _words[number], None)
            yield self._token(Relayed(*note))

    async def _behind_the_thoughts(self) -> tuple[str, dict[str, Any]]:
        """The request for the answer to thoughts that were closed."""
        assert self._wanted is not None
        closing = "".join(_words[number] for number in self._wanted.token_ids)
        self._wanted, self._in_reasoning, self._pieces_before = None, False, self._pieces
        thoughts = self._raw.lstrip().removeprefix(OPEN).lstrip("\n")
        end, ids = await self._prompt({})
        opener = "" if end.rstrip().endswith(OPEN) else f"{OPEN}\n"
        return self._raw_text(ids + await self.upstream.encode(f"{opener}{thoughts}{closing}"))

    async def _without_thoughts(self) -> tuple[str, Mapping[str, Any]]:
        """The request with thoughts that are over before they begin, in R1's own form; as it is where none begin."""
        end, ids = await self._prompt({"enable_thinking": False})
        end = end.rstrip()
        if end.endswith(CLOSE):
            return self._raw_text(ids)
        if len(await self.upstream.encode(CLOSE)) != 1:  # it has no token for it: it does not think
            return self.request.path, self.request.body
        opener = "" if end.endswith(OPEN) else f"{OPEN}\n"
        ids = ids + await self.upstream.encode(f"{opener}\n{CLOSE}\n\n")
        self._prompt_tokens = len(ids)
        return self._raw_text(ids)

    async def _prompt(self, more: Mapping[str, Any]) -> tuple[str, list[int]]:
        body = self.request.body
        variables = {**(body.get("chat_template_kwargs") or {}), **more}
        end, ids = await self.upstream.prompt_ids(body["messages"], variables)
        self._prompt_tokens = len(ids)
        return end, ids

    def _raw_text(self, prompt_ids: list[int]) -> tuple[str, dict[str, Any]]:
        body = {key: value for key, value in self.request.body.items() if key not in _ONLY_IN_CHAT}
        left = None if self.request.max_tokens is None else self.request.max_tokens - self._pieces
        context = self.upstream.traits.context_length if self.upstream.traits else None
        if left is None and context is not None:  # text completions end after 16 tokens if nothing is said
            left = context - len(prompt_ids)
        if left is not None:
            body["max_tokens"] = max(_LEAST_LEFT, left)
        return "/v1/completions", body | {"prompt": prompt_ids}

    async def _counted(self) -> Counted | None:
        """The upstream's own count, where it has told one; what it said before it was cut, we have counted."""
        prompt, said = self._prompt_tokens or _count(self._usage, "prompt_tokens"), self._pieces + 1
        if completion := _count(self._usage, "completion_tokens"):
            said = self._pieces_before + completion
        traits, is_chat = self.upstream.traits, "messages" in self.request.body
        if prompt is None and is_chat and traits and traits.can_continue:  # cut by a stop string before it could tell
            prompt = len((await self._prompt({}))[1])
        if prompt is None:
            return None
        details = self._usage.get("prompt_tokens_details")
        cached = _count(details, "cached_tokens") if isinstance(details, Mapping) else None
        return Counted(prompt, min(cached or 0, prompt), said)

    def _token(self, note: Relayed, finish: FinishReason | None = None) -> Token:
        started = None
        if not self._pieces:
            started = Started(0, self.queue_s, time.monotonic() - self._began)
        self._pieces += 1
        text = "".join(delta.text for delta in note.deltas)
        return Token(self.request.id, -1, text, finish, note, started=started)


def _no_logits() -> Any:
    raise AssertionError("an upstream shows no logits")


def _count(usage: Mapping[str, Any], key: str) -> int | None:
    count = usage.get(key)
    return count if isinstance(count, int) and 0 < count < 2**31 else None


def _said(choice: Mapping[str, Any]) -> _Said:
    delta = choice.get("delta")
    delta = delta if isinstance(delta, dict) else {}
    finish = choice.get("finish_reason")
    return _Said(
        _text(delta.get("reasoning_content") or delta.get("reasoning")),
        _text(delta.get("content") or choice.get("text")),
        tuple(_calls(delta.get("tool_calls"))),
        None if not finish else "length" if finish == "length" else "stop",
        choice.get("reasoning_closed_by"),
    )


def _calls(told: Any) -> Iterator[CallDelta]:
    for call in told if isinstance(told, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            index, name = call.get("index"), function.get("name")
            yield CallDelta(
                index if isinstance(index, int) else 0,
                _text(function.get("arguments")),
                _text(call.get("id")) or None,
                _text(name) or None,
            )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
