"""Several engines as one: who is asked, who is passed over, and what they say of themselves together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from stillhouse.backends.base import BackendFailed, GenerationRequest
from stillhouse.backends.echo import Echo
from stillhouse.backends.engine import Engine
from stillhouse.server.replicas import Replicas


class Pair:
    """Two echoes."""

    def __init__(self) -> None:
        self.engines = [Engine(Echo()), Engine(Echo())]
        self.are_up = [True, True]
        self.replicas = Replicas(self.engines, [lambda: self.are_up[0], lambda: self.are_up[1]])

    def ask(self, text: str, name: str = "a") -> int:
        """Which of the two answers."""
        before = [engine.activity.steps for engine in self.engines]

        async def read() -> list[str]:
            return [token.text async for token in self.replicas.stream([request(name, text)])]

        assert "".join(asyncio.run(read()))
        (index,) = [n for n, engine in enumerate(self.engines) if engine.activity.steps > before[n]]
        return index


def request(name: str, text: str) -> GenerationRequest:
    return GenerationRequest(name, Echo().vocabulary.encode(text), max_tokens=4)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.replicas.close()


def test_a_conversation_stays_where_its_beginning_was_read(pair):
    first = "x" * 64
    there = pair.ask(first)
    assert [pair.ask(f"{first} and more {n}") for n in range(3)] == [there] * 3


def test_one_that_is_down_is_passed_over(pair):
    there = pair.ask("x" * 64)
    pair.are_up[there] = False
    assert pair.ask("x" * 64) == 1 - there
    pair.are_up[1 - there] = False
    with pytest.raises(BackendFailed, match="no replica is up"):
        pair.ask("x")


def test_the_idlest_is_asked(pair):
    async def both() -> int:
        one = pair.replicas.stream([request("one", "a")])
        await anext(one)
        two = pair.replicas.stream([request("two", "b")])
        await anext(two)
        await one.aclose()
        await two.aclose()
        return sum(engine.activity.steps > 0 for engine in pair.engines)

    assert asyncio.run(both()) == 2


def test_what_they_do_is_told_together(pair):
    pair.ask("a")
    assert pair.replicas.activity.steps == sum(engine.activity.steps for engine in pair.engines)
    load, single = pair.replicas.load(), pair.engines[0].load()
    assert (load.running, load.cache_size) == (0, 2 * single.cache_size)
