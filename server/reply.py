"""Tokens in, what a client is told out: deltas, log-probabilities, usage, the reason to end.

One generator for both modes: a streamed reply sends what it yields, a whole one gathers it. It knows what a reply is
made of and nothing of how a surface writes it down.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ..backends.base import FinishReason, Force, Forget, GenerationRequest, Only, PromptTooLong, Sampling, Token
from ..r1.grammar import Form, Matcher
from ..r1.messages import CallDelta, Channel, Delta
from ..r1.split import State
from ..r1.thinking import Outcome, Rules, Thinking
from ..r1.tools import CallParser, Format
from .metrics import Metrics
from .model import ServedModel


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that is ready for the engine, whatever surface it came through."""

    prompt_ids: Sequence[int]
    state: State  # in which a reply begins
    sampling: Sampling
    rules: Rules
    max_tokens: int | None = None  # None = what the context leaves
    n: int = 1
    top_logprobs: int | None = None
    ignore_eos: bool = False
    form: Form | None = None  # that the answers are held to
    begun: str = ""  # what there is of the answer already, of a form's text
    calls: Format | None = None  # how tool calls are written, where the form has them


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

    def __init__(self, model: ServedModel, ask: Ask, metrics: Metrics) -> None:
        room = model.context_length - len(ask.prompt_ids)
        if room < 1:
            raise PromptTooLong(len(ask.prompt_ids), model.context_length - 1)
        room = min(room, ask.max_tokens or room)
        self.ask = ask
        self.id = uuid.uuid4().hex
        self.created = int(time.time())
        self.usage = Usage(len(ask.prompt_ids))
        self.thinking = [
            Thinking(
                model.tags, ask.rules, room, ask.state, force=Force, only=Only, forget=Forget(), grammar=_begin(ask)
            )
            for _ in range(ask.n)
        ]
        self._parsers = [_parser(ask) for _ in range(ask.n)]
        self._model = model
        self._metrics = metrics
        self._requests = [
            GenerationRequest(
                id=f"{self.id}-{index}",
                prompt_ids=ask.prompt_ids,
                max_tokens=room,
                sampling=_own_seed(ask.sampling, index),
                top_logprobs=ask.top_logprobs,
                ignore_eos=ask.ignore_eos,
                steer=steer,
            )
            for index, steer in enumerate(self.thinking)
        ]

    def end_thinking(self) -> bool:
        """Have every reply that still thinks go on to its answer; false if none does."""
        return any([thinking.end_thinking() for thinking in self.thinking])

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what every token adds, as the tokens come. Leaving early cancels."""
        watch = self._metrics.watch(self._model.name, len(self._requests), self.usage.prompt_tokens)
        index_of = {request.id: index for index, request in enumerate(self._requests)}
        try:
            async with aclosing(self._model.engine.stream(self._requests)) as tokens:
                async for token in tokens:
                    watch.token(token)
                    yield self._piece(index_of[token.request_id], token)
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
