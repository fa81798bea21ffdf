"""Engines with a copy of one model each, as one: a request goes where its beginning was read, or to the idlest.

One that is down is passed over; what was in it is lost with it, as on any engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from ..backends.base import Backend, BackendFailed, GenerationRequest, Load, Token
from ..backends.engine import Activity, Engine

_BEGINNING = 64  # tokens by which a conversation is known again
_REMEMBERED = 10_000
_BUSIER = 4  # replies more than the idlest: then no prefix in the cache is worth the wait


class Replicas:
    """As an `Engine` to whoever asks for replies."""

    def __init__(self, engines: Sequence[Engine], are_up: Sequence[Callable[[], bool]]) -> None:
        self._engines = list(engines)
        self._are_up = dict(zip(self._engines, are_up, strict=True))
        self._read: OrderedDict[tuple[int, ...], Engine] = OrderedDict()
        self._asked = dict.fromkeys(self._engines, 0)  # replies asked for and not at their end

    @property
    def backend(self) -> Backend:
        """One of them: all have the same model."""
        return self._engines[0].backend

    @property
    def activity(self) -> Activity:
        """What all of them have been doing; the oldest step in progress counts."""
        all_of_them = [engine.activity for engine in self._engines]
        return Activity(
            steps=sum(activity.steps for activity in all_of_them),
            step_s=sum(activity.step_s for activity in all_of_them),
            last_step_at=max(activity.last_step_at for activity in all_of_them),
            step_began_at=min((it for activity in all_of_them if (it := activity.step_began_at)), default=None),
        )

    def load(self) -> Load:
        """How busy they are, together."""
        loads = [engine.load() for engine in self._engines]
        return Load(*(sum(parts) for parts in zip(*loads, strict=True)))

    async def stream(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Token, None]:
        """Yield the tokens of all requests, mixed, as they come, from one engine. Leaving early cancels."""
        engine = self._choose(requests[0])
        self._asked[engine] += len(requests)
        try:
            async with aclosing(engine.stream(requests)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            self._asked[engine] -= len(requests)

    def read(self, request: GenerationRequest) -> None:
        """Have a prompt read into the KV cache where its beginning is; nobody waits for it."""
        engine = self._read.get(_beginning(request))
        if engine is not None and self._are_up[engine]():
            engine.read(request)

    def close(self) -> None:
        """End all of them."""
        for engine in self._engines:
            engine.close()

    def _choose(self, request: GenerationRequest) -> Engine:
        able = [engine for engine in self._engines if self._are_up[engine]()]
        if not able:
            raise BackendFailed("no replica is up")
        beginning = _beginning(request)
        known = self._read.get(beginning)
        idlest = min(able, key=lambda engine: self._asked[engine])
        chosen = idlest
        if known in able and self._asked[known] <= self._asked[idlest] + _BUSIER:
            chosen = known
        self._read[beginning] = chosen
        self._read.move_to_end(beginning)
        if len(self._read) > _REMEMBERED:
            self._read.popitem(last=False)
        return chosen


def _beginning(request: GenerationRequest) -> tuple[int, ...]:
    return tuple(request.prompt_ids[:_BEGINNING])
