"""The scheduler of checkpoints through MLX, with continuous batching. Knows nothing of HTTP, of `<think>`, or of MLX.

A prompt, a forced run of tokens and a reply that lost its place are all the same thing here: tokens that are known and
not yet decoded (`todo`). All but the last are read in chunks, each reply by itself; the last joins the rows, in which
one call of the model takes every reply a token further. Logits are only ever computed there. The models and the states
they read into belong to an `Executor`: in this process, or the ranks of a cluster.

mlx-lm's own BatchGenerator is the level above: it is always one token ahead of its caller, which a steer cannot be.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from ..r1.errors import UserError
from .base import BackendFailed, GenerationRequest, Load, LoadOptions, Token, Vocabulary
from .draft import Draft
from .executor import Executor
from .kvcache import common_prefix, token_array
from .line import Line
from .pace import Pace
from .prefixstore import PrefixStore, Stored
from .rowsampler import Breakers, RowSampler, next_tokens

_WORTH_COPYING = 8  # tokens: fewer are read again as quickly
_SHORT_RUN = 4  # tokens: so short a run is read beside the others, a token a step, instead of by itself


class _Kept:
    """A state with a size, as `PrefixStore` wants it."""

    __slots__ = ("size", "state")

    def __init__(self, state: int, size: int) -> None:
        self.state = state
        self.size = size  # tokens

    def __len__(self) -> int:
        return self.size


class _Running:
    """A reply in progress."""

    __slots__ = ("draft", "sampler", "state", "todo", "tokens")

    def __init__(self, draft: Draft, sampler: RowSampler) -> None:
        self.draft = draft
        self.sampler = sampler
        self.state: int | None = None  # its handle; None while it waits
        self.tokens = token_array(())  # decoded
        self.todo = token_array(draft.request.prompt_ids)  # known and not yet decoded

    @property
    def known(self) -> array[int]:
        """Every token that is known: decoded and to be decoded."""
        return self.tokens + self.todo


class MlxLm:
    """A checkpoint in memory. Not thread-safe, but for `vocabulary` and `load`."""

    name = "mlx"

    def __init__(self, executor: Executor, vocabulary: Vocabulary, options: LoadOptions) -> None:
        self.context_length = executor.context_length
        self.vocabulary = vocabulary
        self._executor = executor
        self._handles = itertools.count()
        self._pace = Pace(options.batch_tokens)
        self._breakers = Breakers(vocabulary)
        self._rows: list[_Running] = []  # those that a step takes a token further, in the executor's order
        # Of replies that ended; its unit is the token.
        self._store = PrefixStore(executor.cache_tokens, lambda kept: self._executor.drop([kept.state]))
        self._line: Line[_Running] = Line(options.parallel)

    # The contract

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `PromptTooLong`, and `UserError` for what is no token."""
        if not all(0 <= token_id < self.vocabulary.size for token_id in request.prompt_ids):
            raise UserError(f"the prompt has a token id beyond the last, {self.vocabulary.size - 1}")  # MLX would crash
        draft = Draft(request, self.vocabulary, self.context_length)
        self._line.add(_Running(draft, RowSampler(request, self.vocabulary, self._breakers)))

    def step(self) -> list[Token]:
        """A chunk of the prompts, and one drawn token for every reply that has nothing left to decode."""
        try:
            self._admit()
            if not self._line.running:
                return []
            self._read()
            drawing, logits = self._advance()
        except Exception as error:  # mostly memory; MLX has no family of errors of its own
            reason = str(error).strip() or type(error).__name__
            self._fail(reason if isinstance(error, BackendFailed) else f"{self._executor.name} failed: {reason}")
        if not np.isfinite(logits[:, 0]).all():
            self._fail("the model's logits are not numbers: the weights are damaged, or their type overflows here")
        tokens: list[Token] = []
        ended: list[_Running] = []
        for reply in [reply for reply in self._line.running if reply in drawing]:  # in the order they came
            self._draw(reply, logits[drawing[reply]], tokens, ended)
        for reply in ended:
            self._line.leave(reply)
        self._release(ended)
        return tokens

    def cancel(self, request_id: str) -> None:
        """Forget a request. What is decoded of it is kept for the next prompt that begins like it."""
        reply = self._line.find(request_id)
        if reply is not None:
            self._line.leave(reply)
            self._release([reply])

    def load(self) -> Load:
        """How busy it is now."""
        running = list(self._line.running)  # the engine's thread may change it meanwhile
        used = len(running) * max((len(reply.tokens) for reply in running), default=0)
        return Load(len(running), len(self._line.waiting), used + self._store.size, self._executor.cache_tokens)

    def renew(self, executor: Executor) -> None:
        """Go on with another executor of the same model; replies in progress are read again from their beginnings."""
        self._store.clear()
        while self._line.running:
            self._give_way()
        self._executor = executor

    def close(self) -> None:
        """Give the memory back."""
        self._forget_all()
        self._executor.close()

    # A step, phase by phase

    def _admit(self) -> None:
        """Let waiting requests in, in order, each starting from the longest prefix that is in memory."""
        parked = self._line.park()  # what they have decoded is kept, where they will find it again
        self._release(parked)
        for reply in parked:
            reply.tokens = token_array(())
        self._line.admit(lambda prompt: self._longest_prefix(prompt)[1], self._begin)

    def _longest_prefix(self, prompt: array[int]) -> tuple[_Running | Stored | None, int]:
        """Whose state begins most like a prompt, and how many tokens need not be read: the last must, it speaks."""
        source: _Running | Stored | None
        source, length = self._store.longest_prefix(prompt)
        for other in self._line.running:
            common = common_prefix(other.tokens, prompt)
            if common > length:
                source, length = other, common
        length = min(length, len(prompt) - 1)
        return (source, length) if length >= _WORTH_COPYING else (None, 0)

    def _begin(self, reply: _Running) -> bool:
        running = len(self._line.running)
        if running and self._cells_for(running + 1, len(reply.todo)) > self._executor.cache_tokens:
            return False
        source, length = self._longest_prefix(reply.todo)
        reply.state = next(self._handles)
        if isinstance(source, Stored):
            self._store.touch(source)
            self._executor.copy(reply.state, source.data.state, length)
        elif source is not None and source.state is not None:
            self._executor.copy(reply.state, source.state, length)
        else:
            self._executor.begin(reply.state)
        reply.tokens, reply.todo = reply.todo[:length], reply.todo[length:]
        reply.draft.start(length)
        return True

    def _read(self) -> None:
        """Read known tokens but for each reply's last, in the order they came, up to a chunk."""
        in_rows = set(self._rows)
        reading = [reply for reply in self._line.running if len(reply.todo) > 1]
        if len(in_rows) > 1:
            reading = [reply for reply in reading if reply not in in_rows or len(reply.todo) > _SHORT_RUN]
        self._leave_rows([reply for reply in reading if reply in in_rows], self._executor.part)
        room = self._pace.chunk(replying=bool(self._rows))
        for reply in reading:
            count = min(len(reply.todo) - 1, room)
            self._make_room(len(reply.tokens) + count)
            state = reply.state
            if not count or state is None:  # it may have had to give its own cells up
                continue
            started = time.perf_counter()
            self._executor.read(state, reply.todo[:count])
            self._pace.note(count, time.perf_counter() - started)
            reply.tokens, reply.todo = reply.tokens + reply.todo[:count], reply.todo[count:]
            room -= count

    def _advance(self) -> tuple[dict[_Running, int], np.ndarray]:
        """Take every reply with a known last token further; the rows of those that draw now, and all rows' logits."""
        joining = [reply for reply in self._line.running if len(reply.todo) == 1 and reply not in self._rows]
        if joining:
            self._executor.join([reply.state for reply in joining if reply.state is not None])
            self._rows += joining
        if self._rows:
            self._make_room(1 + max(len(reply.tokens) for reply in self._rows))
        rows = self._rows
        if not rows:
            return {}, np.zeros((0, 1), np.float32)
        logits = self._executor.step([reply.todo[0] for reply in rows])
        for reply in rows:
            reply.tokens.append(reply.todo.pop(0))
        return {reply: row for row, reply in enumerate(rows) if not reply.todo}, logits

    def _draw(self, reply: _Running, logits: np.ndarray, tokens: list[Token], ended: list[_Running]) -> None:
        """Draw the next token of one reply, or take those its steer forces."""
        if reply.draft.request.max_tokens == 0:
            drawn = [reply.draft.read()]
        else:
            drawn = next_tokens(reply.draft, reply.sampler, logits)
            reply.todo.extend(token.token_id for token in drawn)
        tokens += drawn
        if drawn[-1].finish:
            ended.append(reply)

    def _make_room(self, longest: int) -> None:
        """Have room for a reply of so many tokens: what is kept goes first, then the youngest replies' own."""
        cells = self._executor.cache_tokens
        while True:
            used = self._cells_for(len(self._line.running), longest)
            self._store.shrink(max(0, cells - used))
            if used <= cells or len(self._line.running) == 1:  # a context is never larger than the cache
                return
            self._give_way()

    def _give_way(self) -> None:
        youngest = self._line.give_way()
        self._forget([youngest])
        youngest.tokens = token_array(())

    # What ends

    def _release(self, replies: list[_Running]) -> None:
        """Take replies out of the batch; what they have decoded is kept for prompts that begin with it."""
        for reply in replies:
            if len(reply.tokens) >= _WORTH_COPYING:
                self._store.put(reply.tokens, lambda reply=reply: self._keep(reply))
        self._forget(replies)

    def _keep(self, reply: _Running) -> _Kept:
        assert reply.state is not None
        kept = _Kept(next(self._handles), len(reply.tokens))
        self._executor.copy(kept.state, reply.state, kept.size)
        return kept

    def _forget(self, replies: list[_Running]) -> None:
        """Drop the states of replies."""
        self._leave_rows([reply for reply in replies if reply.state is not None], self._executor.drop)
        for reply in replies:
            reply.state = None

    def _leave_rows(self, replies: list[_Running], leave: Callable[[list[int]], None]) -> None:
        states = [reply.state for reply in replies if reply.state is not None]
        if states:
            leave(states)
            self._rows = [reply for reply in self._rows if reply not in replies]

    def _cells_for(self, replies: int, longest: int = 0) -> int:
        """Tokens' worth of memory: side by side every reply takes as much as the longest."""
        return replies * max(longest, max((len(reply.tokens) for reply in self._line.running), default=0))

    def _fail(self, reason: str) -> NoReturn:
        """Give up every request: after a failed step the caches cannot be trusted, and memory may be short."""
        self._forget_all()
        raise BackendFailed(reason)

    def _forget_all(self) -> None:
        self._executor.clear()
        self._rows = []
        self._store.clear()
        self._line.clear()
