"""Tokens in, what a client is told out: deltas, log-probabilities, usage, the reason to end.

One generator for both modes: a streamed reply sends what it yields, a whole one gathers it. And for both sources of
tokens, the engine and upstreams. It knows what a reply is made of and nothing of how a surface writes it down.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

from ..backends.base import FinishReason, Force, Forget, GenerationRequest, Only, PromptTooLong, Sampling, Token
from ..r1.grammar import Form, Matcher
from ..r1.messages import CallDelta, Channel, ClosedBy, Delta
from ..r1.split import State
from ..r1.thinking import Outcome, Rules, Tags, Thinking
from ..r1.tools import CallParser, Format
from .metrics import Metrics
from .upstream_reply import Relayed

BOUNDLESS = 2**31 - 1
"""The room of a reply that nobody has measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask(ABC):
    """A request that is ready for where its tokens come from, whatever surface it came through."""

    state: State  # in which a reply begins
    rules: Rules
    max_tokens: int | None = None  # None = what the context leaves
    n: int = 1
    form: Form | None = None  # that the answers are held to
    begun: str = ""  # what there is of the answer already, of a form's text
    calls: Format | None = None  # how tool calls are written, where the form has them

    @property
    @abstractmethod
    def can_cut(self) -> bool:
        """Whether thoughts can be closed by force."""

    @property
    @abstractmethod
    def prompt_tokens(self) -> int | None:
        """What the prompt has; `None` where nobody has counted yet."""

    @abstractmethod
    def room(self, context_length: int | None) -> int:
        """Tokens that a reply may have. Raises `PromptTooLong` where that is none."""

    @abstractmethod
    def request(self, request_id: str, index: int, room: int, steer: Thinking) -> Any:
        """One of the `n` requests, as the source of tokens takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAsk(Ask):
    """A request for the engine."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    top_logprobs: int | None = None
    ignore_eos: bool = False

    @property
    def can_cut(self) -> bool:
        """A steer's wish is obeyed."""
        return True

    @property
    def prompt_tokens(self) -> int:
        """What the prompt has."""
        return len(self.prompt_ids)

    def room(self, context_length: int | None) -> int:
        """What the context leaves, or less if less is asked for."""
        assert context_length is not None, "an engine knows its context"
        room = context_length - len(self.prompt_ids)
        if room < 1:
            raise PromptTooLong(len(self.prompt_ids), context_length - 1)
        return min(room, self.max_tokens or room)

    def request(self, request_id: str, index: int, room: int, steer: Thinking) -> GenerationRequest:
        """As the engine takes it."""
        return GenerationRequest(
            id=request_id,
            prompt_ids=self.prompt_ids,
            max_tokens=room,
            sampling=_own_seed(self.sampling, index),
            top_logprobs=self.top_logprobs,
            ignore_eos=self.ignore_eos,
            steer=steer,
        )


class Source(Protocol):
    """Where tokens come from: the engine of this process, or upstreams."""

    def stream(self, requests: Sequence[Any]) -> AsyncGenerator[Token, None]:
        """Yield the tokens of all requests, mixed, as they come. Leaving early cancels."""
        ...


class Served(Protocol):
    """What replies need of the model that gives them."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def engine(self) -> Source: ...  # noqa: D102

    @property
    def tags(self) -> Tags: ...  # noqa: D102

    @property
    def context_length(self) -> int | None: ...  # noqa: D102


class LogProb(NamedTuple):
    """One token's log-probability, natural, of the model's own distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """What one token adds to one of the replies."""

    choice: int  # which of the `n`, from 0
    deltas: Sequence[Delta]
    channel: Channel
    logprob: LogProb | None
    finish: FinishReason | Literal["tool_calls"] | None
    outcome: Outcome | None
    calls: Sequence[CallDelta] = ()  # after the text


@dataclass(slots=True)
class Usage:
    """Tokens, all replies together."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


class Replies:
    """The replies to one `Ask`: iterate over `pieces`, then read `usage`."""

    def __init__(self, model: Served, ask: Ask, metrics: Metrics) -> None:
        self.ask = ask
        self.id = uuid.uuid4().hex
        self.created = int(time.time())
        self.usage = Usage(ask.prompt_tokens or 0)
        self._room = ask.room(model.context_length)
        self.thinking = [
            Thinking(
                model.tags,
                ask.rules,
                self._room,
                ask.state,
                force=Force,
                only=Only,
                forget=Forget(),
                grammar=_begin(ask),
            )
            for _ in range(ask.n)
        ]
        self._parsers = [_parser(ask) for _ in range(ask.n)]
        self._model = model
        self._metrics = metrics
        self._requests = [
            ask.request(f"{self.id}-{index}", index, self._room, steer) for index, steer in enumerate(self.thinking)
        ]
        self._tokens = [0] * ask.n
        self._called = [False] * ask.n  # whether an upstream's reply has called a tool

    @property
    def thinking_limit(self) -> tuple[int, ClosedBy] | None:
        """Where the thoughts are closed at the latest, and for what reason; `None` where nobody here closes them."""
        if self.ask.state == "answering":
            return None
        tokens, by = self.thinking[0].limit
        return (tokens, by) if tokens < BOUNDLESS // 2 else None

    @property
    def can_end_thinking(self) -> bool:
        """Whether anybody here can close the thoughts."""
        return self.ask.can_cut

    def end_thinking(self) -> bool:
        """Have every reply that still thinks go on to its answer; false if none does."""
        return any([thinking.end_thinking() for thinking in self.thinking])

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what every token adds, as the tokens come. Leaving early cancels."""
        watch = self._metrics.watch(self._model.name, len(self._requests), self.ask.prompt_tokens)
        index_of = {request.id: index for index, request in enumerate(self._requests)}
        try:
            async with aclosing(self._model.engine.stream(self._requests)) as tokens:
                async for token in tokens:
                    watch.token(token)
                    choice = index_of[token.request_id]
                    if isinstance(token.note, Relayed):
                        if token.note.counted and choice == 0:
                            watch.prompt(*token.note.counted[:2])
                        yield self._relayed(choice, token, token.note)
                    else:
                        yield self._piece(choice, token)
        except BaseException as error:
            watch.lost(error)
            raise
        finally:
            watch.close()

    def _piece(self, choice: int, token: Token) -> Piece:
        usage = self.usage
        usage.completion_tokens += 1
        if token.started and choice == 0:  # the others of n find what the first one had to read
            usage.cached_tokens = token.started.cached_tokens
        deltas, channel, outcome = token.note
        if outcome:
            usage.reasoning_tokens += outcome.reasoning_tokens
        logprob = None if token.logprob is None else LogProb(token.token_id, token.logprob, token.top_logprobs)
        parser = self._parsers[choice]
        if parser is None:
            return Piece(choice, deltas, channel, logprob, token.finish, outcome)
        deltas, calls = _read_calls(parser, deltas, ending=token.finish is not None)
        finish = "tool_calls" if token.finish == "stop" and parser.whole else token.finish
        return Piece(choice, deltas, channel, logprob, finish, outcome, calls)

    def _relayed(self, choice: int, token: Token, note: Relayed) -> Piece:
        usage = self.usage
        usage.completion_tokens += 1
        self._tokens[choice] += 1
        if note.outcome:
            usage.reasoning_tokens += note.outcome.reasoning_tokens
        if note.counted:
            usage.completion_tokens += note.counted.completion_tokens - self._tokens[choice]
            usage.prompt_tokens = usage.prompt_tokens or note.counted.prompt_tokens
            usage.cached_tokens = note.counted.cached_tokens if choice == 0 else usage.cached_tokens
        self._called[choice] = self._called[choice] or bool(note.calls)
        finish = "tool_calls" if token.finish == "stop" and self._called[choice] else token.finish
        return Piece(choice, note.deltas, note.channel, None, finish, note.outcome, note.calls)


def _begin(ask: Ask) -> Matcher | None:
    if ask.form is None:
        return None
    matcher = ask.form.start()
    matcher.take_text(ask.begun)
    return matcher


def _parser(ask: Ask) -> CallParser | None:
    if ask.calls is None:
        return None
    parser = CallParser(ask.calls)
    parser.add(ask.begun)
    return parser


def _read_calls(parser: CallParser, deltas: Sequence[Delta], *, ending: bool) -> tuple[list[Delta], list[CallDelta]]:
    """Take the calls out of the answer's deltas. What looks like one in the thoughts is a thought."""
    texts: list[Delta] = []
    calls: list[CallDelta] = []
    for delta in deltas:
        if delta.channel == "answer":
            said, pieces = parser.add(delta.text)
            calls += pieces
            delta = Delta("answer", said)
        texts += [delta] if delta.text else []
    if ending and (held := parser.finish()):
        texts.append(Delta("answer", held))
    return texts, calls


def _own_seed(sampling: Sampling, index: int) -> Sampling:
    """Every one of `n` replies draws by a seed of its own, all told by the request's."""
    return sampling if sampling.seed is None or index == 0 else replace(sampling, seed=sampling.seed + index)
