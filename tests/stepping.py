"""A backend stepped by hand, without an engine: what is asked of it, and what it says until nothing is left to do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from stillhouse.backends.base import GenerationRequest, Sampling, Started, Token

GREEDY = Sampling(temperature=0)
LONG = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
_ids = itertools.count()


def ask(backend: Any, prompt: str | Sequence[int], max_tokens: int = 8, **fields: Any) -> GenerationRequest:
    prompt_ids = backend.vocabulary.encode(prompt) if isinstance(prompt, str) else prompt
    fields = {"sampling": GREEDY, "ignore_eos": True} | fields
    request = GenerationRequest(id=str(next(_ids)), prompt_ids=prompt_ids, max_tokens=max_tokens, **fields)
    backend.add(request)
    return request


def run(backend: Any) -> dict[str, list[Token]]:
    """Step until nothing is left to do; the tokens by request."""
    tokens: dict[str, list[Token]] = {}
    while sum(backend.load()[:2]) or backend._line.idle:
        for token in backend.step():
            tokens.setdefault(token.request_id, []).append(token)
    return tokens


def reply(backend: Any, prompt: str | Sequence[int], max_tokens: int = 8, **fields: Any) -> list[Token]:
    request = ask(backend, prompt, max_tokens, **fields)
    return run(backend)[request.id]


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.token_id for token in tokens]


def cached(tokens: Sequence[Token]) -> int:
    assert isinstance(tokens[0].started, Started)
    return tokens[0].started.cached_tokens
