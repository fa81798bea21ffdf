"""A reply as far as it has come: what every backend does with a drawn token. Knows nothing of any runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .base import FinishReason, GenerationRequest, PromptTooLong, Started, Token, Vocabulary, Wish
from .sampling import likeliest
from .text import TextDecoder


class Told(NamedTuple):
    """What a caller is told of the distribution that a token was drawn from."""

    logprob: float  # of the token
    top: tuple[tuple[int, float], ...]  # (token id, natural log), likeliest first


class Draft:
    """One request being answered: counts its tokens, joins their text, and asks its steer."""

    __slots__ = ("_decoder", "_limit", "_vocabulary", "added_at", "cached_tokens", "drawn", "request", "started_at")

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary, context_length: int) -> None:
        prompt_tokens = len(request.prompt_ids)
        room = context_length - prompt_tokens
        if room < 1:
            raise PromptTooLong(prompt_tokens, context_length - 1)
        self.request = request
        self.drawn = 0  # tokens of the reply
        self.added_at = time.monotonic()
        self.started_at: float | None = None  # when its prompt began to be read
        self.cached_tokens = 0
        self._limit = min(request.max_tokens, room)
        self._vocabulary = vocabulary
        self._decoder = TextDecoder()

    def start(self, cached_tokens: int) -> None:
        """Note that the prompt is being read, and how much of it need not be. Only the first call counts."""
        if self.started_at is None:
            self.started_at = time.monotonic()
            self.cached_tokens = cached_tokens

    def wish(self, logits: Callable[[], NDArray[np.float32]]) -> Wish:
        """What the steer wants before the next token is drawn."""
        return self.request.steer.wish(logits) if self.request.steer else None

    def take(
        self, token_id: int, logprobs: NDArray[np.float32] | None = None, *, told: Told | None = None
    ) -> Token | None:
        """Add a token; `None` where the steer overrules the model's end: forget the token and draw again.

        Where the request wants to be told: `logprobs`, (vocabulary,), are those it was drawn from; or `told` is what
        is to be said of them, where they lie elsewhere.
        """
        text, finish = "", None
        if token_id in self._vocabulary.end_ids and not self.request.ignore_eos:
            finish = "stop"
        else:
            text = self._decoder.add(self._vocabulary.shown(token_id))
            if self.drawn + 1 >= self._limit:
                finish = "length"
        if finish:
            text += self._decoder.finish()
        note = None
        if self.request.steer:
            note, decided = self.request.steer.see(token_id, text, finish)
            if finish == "stop" and decided is None:
                return None
            finish = decided or finish
        self.drawn += 1
        if logprobs is not None:
            told = Told(float(logprobs[token_id]), likeliest(logprobs, self.request.top_logprobs or 0))
        if told is None:
            return self._token(token_id, text, finish, note)
        return self._token(token_id, text, finish, note, told.logprob, told.top)

    def force(self, token_ids: Sequence[int]) -> list[Token]:
        """Add the tokens that a steer asked for, up to one that ends the reply or that the steer now overrules."""
        tokens: list[Token] = []
        for token_id in token_ids:
            token = self.take(token_id)
            if token:
                tokens.append(token)
            if not token or token.finish:
                break
        return tokens

    def read(self) -> Token:
        """The one token of a request that only wanted its prompt in the cache."""
        return self._token(-1, "", "length", None)

    def _token(
        self,
        token_id: int,
        text: str,
        finish: FinishReason | None,
        note: object,
        logprob: float | None = None,
        top_logprobs: tuple[tuple[int, float], ...] = (),
    ) -> Token:
        started = None
        if self.drawn <= 1:
            began = self.started_at or self.added_at
            started = Started(self.cached_tokens, began - self.added_at, time.monotonic() - began)
        return Token(self.request.id, token_id, text, finish, note, logprob, top_logprobs, started)
