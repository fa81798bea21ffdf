"""What every backend promises, whatever its runtime: one suite, run on each of them.

The random models are real llama.cpp, PyTorch and MLX with nonsense for weights; SmolLM2 is a real model.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster_ranks import Cluster

from stillhouse.backends.base import (
    Backend,
    BackendFailed,
    FinishReason,
    Force,
    GenerationRequest,
    Load,
    LoadOptions,
    Only,
    PromptTooLong,
    Sampling,
    Started,
    Token,
    Wish,
)
from stillhouse.backends.cluster_ranks import Ranks
from stillhouse.backends.echo import Echo
from stillhouse.backends.engine import Engine
from stillhouse.backends.open import open_ranks

GREEDY = Sampling(temperature=0)
PROMPTS = ("The sea is", "Once upon a time", "One, two, three, four", "My favourite food is")
PLACES = 4
CONTEXT = 1024
SMOLLM2 = pytest.param("smollm2", marks=pytest.mark.slow)


RANKS = pytest.param("ranks", marks=pytest.mark.slow)


@pytest.fixture(params=["echo", "llama.cpp", "pytorch", "mlx", RANKS, SMOLLM2])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each of them, with the same context and as many places. A new backend is a line more."""
    if request.param == "echo":
        return Echo(context_length=CONTEXT, parallel=PLACES)
    if request.param in ("pytorch", "mlx"):
        open_checkpoint, folder = map(request.getfixturevalue, ("open_checkpoint", "checkpoint_path"))
        return open_checkpoint(request.param, folder, context=CONTEXT, parallel=PLACES)
    if request.param == "ranks":
        ranks, folder = map(request.getfixturevalue, ("two_ranks", "checkpoint_path"))
        ranks.clear()
        return Unclosed(open_ranks([folder / "model.safetensors"], LoadOptions(parallel=PLACES), ranks).backend)
    open_llama = request.getfixturevalue("open_llama")
    if request.param == "llama.cpp":
        return Unclosed(open_llama(request.getfixturevalue("random_path"), context=CONTEXT, parallel=PLACES))
    path = request.getfixturevalue("smollm2_path")
    return Unclosed(open_llama(path, context=CONTEXT, parallel=PLACES, threads=2))


@pytest.fixture(scope="module")
def two_ranks(checkpoint_path: Path) -> Iterator[Ranks]:
    """The same model as MLX's, on two ranks."""
    pytest.importorskip("mlx_lm", reason='MLX is not installed: pip install "stillhouse[mlx]"')
    cluster = Cluster(checkpoint_path, 2, "tensor", context=CONTEXT)
    yield Ranks(cluster.wires, epoch=1, ready=cluster.said)
    cluster.close()


class Unclosed:
    """A backend that its fixture closes, not its engine."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def close(self) -> None:
        pass


@pytest.fixture
def engine(backend: Backend) -> Iterator[Engine]:
    engine = Engine(backend)
    yield engine
    engine.close()


class Guide:
    """A steer that asks for one wish after the other, remembers what it saw, and ends where it is told to."""

    def __init__(self, *wishes: Wish, decide: Callable[[int], FinishReason | None] | None = None) -> None:
        self.seen: list[tuple[int, str, FinishReason | None]] = []
        self._wishes = iter(wishes)
        self._decide = decide

    def wish(self, logits: Callable[[], Any]) -> Wish:
        return next(self._wishes, None)

    def see(self, token_id: int, text: str, finish: FinishReason | None) -> tuple[Any, FinishReason | None]:
        self.seen.append((token_id, text, finish))
        return f"note {len(self.seen)}", self._decide(len(self.seen)) if self._decide else finish


_ids = itertools.count()


def ask(backend: Backend, text: str = PROMPTS[0], max_tokens: int = 16, **fields: Any) -> GenerationRequest:
    fields = {"sampling": GREEDY, "prompt_ids": backend.vocabulary.encode(text)} | fields
    return GenerationRequest(id=str(next(_ids)), max_tokens=max_tokens, **fields)


def replies(engine: Engine, *requests: GenerationRequest) -> list[list[Token]]:
    """The tokens of each request, all asked at once."""
    tokens = list(engine.generate(requests))
    return [[token for token in tokens if token.request_id == request.id] for request in requests]


def reply(engine: Engine, text: str = PROMPTS[0], max_tokens: int = 16, **fields: Any) -> list[Token]:
    return replies(engine, ask(engine.backend, text, max_tokens, **fields))[0]


def ids(tokens: Iterable[Token]) -> list[int]:
    return [token.token_id for token in tokens]


def text(tokens: Iterable[Token]) -> str:
    return "".join(token.text for token in tokens)


def only(backend: Backend, *token_ids: int) -> Only:
    allowed = np.zeros(-(-backend.vocabulary.size // 32) * 32, np.uint8)
    allowed[list(token_ids)] = 1
    return Only(np.packbits(allowed, bitorder="little").view(np.uint32))


def end_id(backend: Backend) -> int:
    return min(backend.vocabulary.end_ids)


# Many at once


def test_streams_do_not_mix(engine):
    alone = [ids(reply(engine, prompt, 12)) for prompt in PROMPTS]
    together = replies(engine, *(ask(engine.backend, prompt, 12) for prompt in PROMPTS))
    assert [ids(tokens) for tokens in together] == alone


def test_requests_beyond_the_places_wait_in_order_and_all_finish(backend):
    requests = [ask(backend, f"{n} is {prompt}", 3, ignore_eos=True) for n, prompt in enumerate(PROMPTS * 3)]
    for request in requests:
        backend.add(request)
    assert backend.load()[:2] == (0, 12)
    tokens = run(backend)
    assert backend.load()[:2] == (0, 0)
    assert {request.id: len([t for t in tokens if t.request_id == request.id]) for request in requests} == {
        request.id: 3 for request in requests
    }
    assert [token.request_id for token in tokens if token.started] == [request.id for request in requests]
    assert [token.request_id for token in tokens if token.finish] == [request.id for request in requests]


def test_never_more_than_the_places_run(backend):
    for _ in range(6):
        backend.add(ask(backend, max_tokens=4, ignore_eos=True))
    backend.step()
    assert backend.load()[:2] == (PLACES, 2) or backend.name != "echo"  # one may wait for a prompt to copy
    while backend.load().running:
        backend.step()
        assert backend.load().running <= PLACES


def test_many_replies_to_one_prompt_are_each_their_own(engine):
    sampled = [ask(engine.backend, sampling=Sampling(temperature=1, seed=n), ignore_eos=True) for n in (1, 2, 1)]
    greedy = [ask(engine.backend, ignore_eos=True) for _ in range(2)]
    first, second, third, fourth, fifth = map(ids, replies(engine, *sampled, *greedy))
    assert first == third
    assert fourth == fifth
    assert engine.backend.name == "echo" or first != second


def test_equal_seeds_give_equal_replies(engine):
    said = [ids(reply(engine, sampling=Sampling(temperature=1.5, seed=seed))) for seed in (7, 7, 2**60 + 7, 2**60 + 7)]
    assert said[0] == said[1]
    assert said[2] == said[3]


def test_the_first_token_tells_once_what_the_prompt_cost(engine):
    first, *others = reply(engine, ignore_eos=True)
    assert isinstance(first.started, Started)
    assert first.started.cached_tokens == 0
    assert min(first.started.queue_s, first.started.prefill_s) >= 0
    assert [token.started for token in others] == [None] * 15


# Leaving early


def test_a_cancelled_request_gives_no_more_tokens(backend):
    stays, goes, waits = [ask(backend, prompt, 8, ignore_eos=True) for prompt in PROMPTS[:3]]
    backend.add(stays)
    backend.add(goes)
    backend.step()
    backend.add(waits)
    for request in (goes, waits):
        backend.cancel(request.id)
        backend.cancel(request.id)
    backend.cancel("nobody")
    assert {token.request_id for token in run(backend)} == {stays.id}
    assert backend.load()[:2] == (0, 0)


def test_leaving_the_stream_cancels_the_request(engine):
    async def leave_after(count: int) -> int:
        stream = engine.stream([ask(engine.backend, max_tokens=900, ignore_eos=True)])
        taken = [token async for token, _ in azip(stream, range(count))]
        await stream.aclose()
        return len(taken)

    assert asyncio.run(leave_after(3)) == 3
    assert len(reply(engine, max_tokens=1)) == 1  # its turn came after the cancellation
    assert engine.backend.load()[:2] == (0, 0)


def test_leaving_generate_cancels_all_its_requests(engine):
    tokens = engine.generate([ask(engine.backend, max_tokens=900, ignore_eos=True) for _ in range(6)])
    next(tokens)
    tokens.close()
    assert len(reply(engine, max_tokens=1)) == 1
    assert engine.backend.load()[:2] == (0, 0)


async def azip(stream: Any, numbers: Iterable[int]) -> Any:
    for number in numbers:
        yield await anext(stream), number


# Text


WORDS = ["😀😃", "日本語、中文。", "naïve café", "👩‍👩‍👧 e\u0301", "\u0000\ud7ff\ufdd0", "𝔘𝔫𝔦"]


@pytest.mark.parametrize("words", WORDS)
def test_a_character_spread_over_tokens_arrives_whole(engine, words):
    token_ids = engine.backend.vocabulary.encode(words)
    tokens = reply(engine, max_tokens=len(token_ids), steer=Guide(Force(tuple(token_ids))))
    assert ids(tokens) == token_ids
    assert text(tokens) == words
    assert "\ufffd" not in words and not any("\ufffd" in token.text for token in tokens)


def test_the_texts_joined_are_the_bytes_decoded(engine):
    for prompt in PROMPTS:
        tokens = reply(engine, prompt, 40, sampling=Sampling(temperature=2, seed=1))
        whole = b"".join(engine.backend.vocabulary.shown(token_id) for token_id in ids(tokens))
        assert text(tokens) == whole.decode(errors="replace")


def test_half_a_character_at_the_end_is_told_as_such(engine):
    first_byte = engine.backend.vocabulary.encode("😀")[:1]
    assert text(reply(engine, max_tokens=1, steer=Guide(Force(tuple(first_byte))))) == "\ufffd"


def test_a_control_token_shows_no_text(engine):
    tokens = reply(engine, max_tokens=2, steer=Guide(Force((end_id(engine.backend),))))
    assert tokens[0][:4] == (tokens[0].request_id, end_id(engine.backend), "", "stop")


# Where it ends


def test_a_reply_has_as_many_tokens_as_were_asked_for(engine):
    for count in (1, 2, 7):
        tokens = reply(engine, max_tokens=count, ignore_eos=True)
        assert [token.finish for token in tokens] == [None] * (count - 1) + ["length"]


def test_a_reply_ends_where_the_context_is_full(backend):
    prompt = (backend.vocabulary.encode("one two three four ") * CONTEXT)[: CONTEXT - 3]
    backend.add(ask(backend, prompt_ids=prompt, max_tokens=100, ignore_eos=True))
    assert [token.finish for token in run(backend)] == [None, None, "length"]


def test_no_tokens_at_all_only_read_the_prompt(backend):
    backend.add(ask(backend, max_tokens=0, steer=Guide()))
    (token,) = run(backend)
    assert token[1:4] == (-1, "", "length")
    assert token.started and token.started.cached_tokens == 0
    assert backend.load()[:2] == (0, 0)


def test_an_ignored_end_is_never_drawn_and_ends_nothing(engine):
    end = end_id(engine.backend)
    wanted = Sampling(temperature=1, seed=1, logit_bias=((end, 100.0),))
    assert ids(reply(engine, sampling=wanted))[0] == end
    tokens = reply(engine, sampling=wanted, ignore_eos=True)
    assert (len(tokens), tokens[-1].finish) == (16, "length")
    assert not engine.backend.vocabulary.end_ids & set(ids(tokens))
    forced = reply(engine, max_tokens=3, ignore_eos=True, steer=Guide(Force((end, end))))
    assert (ids(forced)[:2], len(forced)) == ([end, end], 3)


# Steers


def test_forced_tokens_come_next_to_the_letter(engine):
    free = ids(reply(engine))
    one, several = engine.backend.vocabulary.encode("x"), engine.backend.vocabulary.encode("So it was, he said.")
    guide = Guide(None, Force(tuple(one)), None, Force(tuple(several)))
    tokens = reply(engine, max_tokens=len(several) + 6, ignore_eos=True, steer=guide)
    said = ids(tokens)
    assert [said[0], said[1:2], said[3 : 3 + len(several)]] == [free[0], one, several]
    assert len(said) == len(several) + 6
    assert ids(tokens) == [token_id for token_id, _, _ in guide.seen]
    assert [token.note for token in tokens] == [f"note {n + 1}" for n in range(len(tokens))]


def test_what_was_forced_is_read_like_any_other_token(engine):
    """After a forced run the reply goes on as if the prompt had ended with it."""
    prompt = engine.backend.vocabulary.encode("The sea is")
    forced = engine.backend.vocabulary.encode(" deep and it is")
    told = reply(engine, max_tokens=len(forced) + 6, steer=Guide(Force(tuple(forced))))
    read = reply(engine, prompt_ids=prompt + forced, max_tokens=6)
    if engine.backend.name != "echo":  # its script does not hear what was forced
        assert ids(told)[len(forced) :] == ids(read)


def test_a_forced_end_ends_the_reply(engine):
    some, end = engine.backend.vocabulary.encode("so"), end_id(engine.backend)
    tokens = reply(engine, steer=Guide(Force((*some, end, *some))))
    assert ids(tokens) == [*some, end]
    assert [token.finish for token in tokens] == [None] * len(some) + ["stop"]


def test_forced_tokens_stop_at_the_last_that_was_asked_for(engine):
    """Echo went on with what was forced, and its engine died of tokens that nobody waited for."""
    some = engine.backend.vocabulary.encode("one two three four")
    tokens = reply(engine, max_tokens=2, steer=Guide(Force(tuple(some))))
    assert [token[1:4:2] for token in tokens] == [(some[0], None), (some[1], "length")]
    assert len(reply(engine, max_tokens=2, ignore_eos=True)) == 2


def test_only_the_allowed_tokens_are_drawn(engine):
    some = engine.backend.vocabulary.encode("abcdefgh ijklm")
    one = [ids(reply(engine, max_tokens=1, steer=Guide(only(engine.backend, token_id))))[0] for token_id in some]
    assert one == some
    for sampling in (GREEDY, Sampling(temperature=1.5, seed=3)):
        guide = Guide(*[only(engine.backend, *some)] * 12)
        tokens = reply(engine, max_tokens=12, sampling=sampling, steer=guide)
        assert len(tokens) == 12
        assert set(ids(tokens)) <= set(some)


def test_a_mask_without_a_token_is_told_and_the_engine_lives_on(engine):
    with pytest.raises(Exception, match="no token is allowed next"):
        reply(engine, steer=Guide(only(engine.backend)))
    assert len(reply(engine, max_tokens=2, ignore_eos=True)) == 2


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_steer_ends_the_reply_with_what_it_saw(engine, finish):
    guide = Guide(decide=lambda count: finish if count == 3 else None)
    tokens = reply(engine, max_tokens=50, ignore_eos=True, steer=guide)
    assert [token.finish for token in tokens] == [None, None, finish]


def test_a_steer_overrules_the_models_own_end(engine):
    """The end is forgotten, and what the steer asks for instead is read as if it had come at once."""
    end, some = end_id(engine.backend), tuple(engine.backend.vocabulary.encode("and more"))
    guide = Guide(Force(some), only(engine.backend, end), Force(some), decide=lambda count: None)
    tokens = reply(engine, max_tokens=2 * len(some), steer=guide)
    assert ids(tokens) == [*some, *some]
    assert guide.seen[len(some)] == (end, "", "stop")


def test_an_overruled_end_loses_no_half_character(engine):
    """The bytes that waited for the rest of their character were given up with the end."""
    end, smile = end_id(engine.backend), engine.backend.vocabulary.encode("😀")
    guide = Guide(Force((*smile[:1], end)), Force(tuple(smile[1:])), decide=lambda count: None)
    assert text(reply(engine, max_tokens=len(smile), steer=guide)) == "😀"


def test_a_forced_end_may_be_overruled_too(engine):
    """After a forced run with an overruled end, llama.cpp drew from logits that knew nothing of the run."""
    end, some = end_id(engine.backend), engine.backend.vocabulary.encode("and more")
    more = engine.backend.vocabulary.encode("!")
    guide = Guide(Force((*some, end, *some)), Force(tuple(more)), decide=lambda count: None)
    tokens = reply(engine, max_tokens=len(some) + 1, steer=guide)
    assert ids(tokens) == [*some, *more]
    plain = reply(engine, max_tokens=len(some) + 4, steer=Guide(Force((*some, end)), decide=lambda count: None))
    again = reply(engine, max_tokens=len(some) + 4, steer=Guide(Force(tuple(some)), decide=lambda count: None))
    assert ids(plain) == ids(again)


def test_a_mask_is_forgotten_with_the_end_that_was_drawn_under_it(engine):
    """llama.cpp drew again from logits that still were masked: the same end, for ever."""
    plain = reply(engine, max_tokens=3, steer=Guide(decide=lambda count: None))
    guide = Guide(only(engine.backend, end_id(engine.backend)), decide=lambda count: "stop" if count > 9 else None)
    assert ids(reply(engine, max_tokens=3, steer=guide)) == ids(plain)


def test_the_length_cannot_be_overruled(engine):
    tokens = reply(engine, max_tokens=2, ignore_eos=True, steer=Guide(decide=lambda count: None))
    assert [token.finish for token in tokens] == [None, "length"]


def test_a_steer_is_shown_the_models_own_logits(engine):
    rows: list[Any] = []

    class Looks(Guide):
        def wish(self, logits: Callable[[], Any]) -> Wish:
            rows.append(logits())
            rows[-1].copy()[:] = 0
            return None

    tokens = reply(engine, max_tokens=3, steer=Looks(), ignore_eos=False)
    assert [row.shape for row in rows] == [(engine.backend.vocabulary.size,)] * len(tokens)
    assert [int(row.argmax()) for row in rows] == ids(tokens)


def test_a_failing_steer_is_told_and_the_engine_lives_on(engine):
    class Fails(Guide):
        def see(self, token_id: int, text: str, finish: FinishReason | None) -> tuple[Any, FinishReason | None]:
            raise RuntimeError("no idea")

    with pytest.raises(RuntimeError, match="no idea"):
        reply(engine, steer=Fails())
    assert len(reply(engine, max_tokens=2, ignore_eos=True)) == 2


# Log-probabilities


def test_log_probabilities_are_natural_and_of_the_models_own_distribution(engine):
    size = engine.backend.vocabulary.size
    (greedy,) = reply(engine, max_tokens=1, top_logprobs=size)
    assert len(greedy.top_logprobs) == size
    assert math.isclose(sum(math.exp(logprob) for _, logprob in greedy.top_logprobs), 1, rel_tol=1e-3)
    assert [logprob for _, logprob in greedy.top_logprobs] == sorted((p for _, p in greedy.top_logprobs), reverse=True)
    assert greedy.top_logprobs[0] == (greedy.token_id, greedy.logprob)
    hot = Sampling(temperature=3, top_k=40, seed=5, logit_bias=((greedy.token_id, -100.0),))
    (drawn,) = reply(engine, max_tokens=1, top_logprobs=size, sampling=hot)
    assert drawn.token_id != greedy.token_id
    assert dict(drawn.top_logprobs)[drawn.token_id] == drawn.logprob
    np.testing.assert_allclose(
        [dict(drawn.top_logprobs)[token_id] for token_id, _ in greedy.top_logprobs[:50]],
        [logprob for _, logprob in greedy.top_logprobs[:50]],
        atol=0.02,  # the second prompt is read from the cache: the last bits of the logits may differ
    )


def test_as_many_log_probabilities_as_were_asked_for(engine):
    for wanted in (0, 1, 5):
        tokens = reply(engine, max_tokens=3, top_logprobs=wanted, ignore_eos=True)
        assert [len(token.top_logprobs) for token in tokens] == [wanted] * 3
        assert all(token.logprob is not None and token.logprob <= 1e-6 for token in tokens)
    assert {token.logprob for token in reply(engine)} == {None}


def test_a_forced_token_has_no_log_probability(engine):
    forced = engine.backend.vocabulary.encode("x")
    tokens = reply(engine, max_tokens=2, top_logprobs=1, ignore_eos=True, steer=Guide(Force(tuple(forced))))
    assert [token.logprob is None for token in tokens] == [True, False]


def test_a_mask_does_not_change_the_log_probabilities(engine):
    free = reply(engine, max_tokens=1, top_logprobs=3)[0]
    other = next(token_id for token_id in range(60, 99) if token_id != free.token_id)
    masked = reply(engine, max_tokens=1, top_logprobs=3, steer=Guide(only(engine.backend, other)))[0]
    assert masked.token_id == other
    assert [token_id for token_id, _ in masked.top_logprobs][:1] == [free.token_id]
    assert masked.logprob is not None and free.logprob is not None and masked.logprob <= free.logprob


# What goes wrong


def test_a_prompt_that_does_not_fit_is_told_to_its_caller_only(engine):
    async def all_at_once() -> list[Any]:
        long = engine.backend.vocabulary.encode("a") * CONTEXT
        requests = [ask(engine.backend, prompt_ids=long), *(ask(engine.backend, ignore_eos=True) for _ in range(2))]

        async def tokens_of(request: GenerationRequest) -> int:
            return len([token async for token in engine.stream([request])])

        return await asyncio.gather(*map(tokens_of, requests), return_exceptions=True)

    error, *others = asyncio.run(all_at_once())
    assert isinstance(error, PromptTooLong)
    assert (error.tokens, error.limit) == (CONTEXT, CONTEXT - 1)
    assert "1024" in error.message and "1023" in error.message
    assert others == [16, 16]


class Stumbles(Echo):
    """An Echo whose third step fails, once."""

    def __init__(self) -> None:
        super().__init__(context_length=CONTEXT)
        self.steps = 0

    def step(self) -> list[Token]:
        self.steps += 1
        if self.steps == 3:
            raise MemoryError("no memory left")
        return super().step()


def test_a_failing_step_is_told_to_all_and_the_engine_lives_on():
    engine = Engine(Stumbles())
    heard: list[tuple[int, str]] = []

    def listen(request: GenerationRequest) -> None:
        taken = 0
        try:
            for _ in engine.generate([request]):
                taken += 1
        except MemoryError as error:
            heard.append((taken, str(error)))

    both = engine.generate([ask(engine.backend), ask(engine.backend, PROMPTS[1])])
    with pytest.raises(MemoryError, match="no memory left"):
        list(both)
    assert engine.backend.load()[:2] == (0, 0)
    engine.backend.steps = 0
    threads = [threading.Thread(target=listen, args=[ask(engine.backend, prompt)]) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert {message for _, message in heard} == {"no memory left"}
    assert text(reply(engine)) == "The sea is"
    engine.close()


class Babbles(Echo):
    """An Echo that goes on after the end."""

    def step(self) -> list[Token]:
        tokens = super().step()
        return tokens + [token for token in tokens if token.finish]


def test_a_token_that_nobody_waits_for_is_let_go():
    """It ended the engine's thread, and all later callers waited for ever."""
    engine = Engine(Babbles(parallel=2))
    first, second = replies(engine, ask(engine.backend, "a"), ask(engine.backend, "bc"))
    assert (text(first), text(second)) == ("a", "bc")
    engine.close()


def test_closing_ends_those_who_wait_and_turns_later_ones_away():
    engine = Engine(Echo(step_s=0.001, context_length=1_000_000))
    tokens = engine.generate([ask(engine.backend, max_tokens=900_000, ignore_eos=True)])
    next(tokens)
    engine.close()
    with pytest.raises(BackendFailed, match="shutting down"):
        list(tokens)
    with pytest.raises(BackendFailed, match="shutting down"):
        list(engine.generate([ask(engine.backend)]))
    with pytest.raises(BackendFailed, match="shutting down"):
        asyncio.run(anext(engine.stream([ask(engine.backend)])))
    engine.close()
    assert engine.backend.load() == Load(0, 0, 0, 4)


def test_whoever_comes_while_it_closes_is_answered():
    """A request that came between the check and the thread's end waited for ever."""
    for _ in range(20):
        engine = Engine(Echo())
        heard: list[str] = []

        def listen(engine: Engine = engine, heard: list[str] = heard) -> None:
            try:
                heard.append(text(reply(engine)))
            except BackendFailed as error:
                heard.append(error.message)

        threads = [threading.Thread(target=listen) for _ in range(4)]
        for thread in threads:
            thread.start()
        engine.close()
        for thread in threads:
            thread.join(5)
        assert len(heard) == 4
        assert set(heard) <= {"The sea is", "the server is shutting down"}


def run(backend: Backend) -> Sequence[Token]:
    """Step until nothing is left to do."""
    tokens: list[Token] = []
    while sum(backend.load()[:2]):
        tokens += backend.step()
    return tokens


class Counts(Echo):
    """An Echo that counts what it is given."""

    added = 0

    def add(self, request: GenerationRequest) -> None:
        self.added += 1
        super().add(request)


def test_no_more_than_a_few_prompts_wait_to_be_read_for_nobody():
    """Under load, reading ahead piled up for every conversation there had been."""
    backend = Counts(parallel=2)
    engine = Engine(backend)
    is_held, free = threading.Event(), threading.Event()
    held = threading.Thread(target=engine.between_steps, args=[lambda _: (is_held.set(), free.wait(10))])
    held.start()
    assert is_held.wait(10)
    for number in range(100):
        engine.read(GenerationRequest(f"ahead {number}", [1, 2, 3], 0, idle=True))
    free.set()
    held.join(10)
    assert text(reply(engine)) == "The sea is"
    assert backend.added == 16 + 1
    engine.close()
