"""What the backends for checkpoints do beyond the contract: prefixes, chunks, a full cache, idle work, sampling.

The same tests for PyTorch and MLX, on a Qwen2 with random weights; llama.cpp's own are in test_llamacpp.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stepping import LONG, cached, ids

from stillhouse.backends import machine
from stillhouse.backends.base import Backend, BackendFailed, Force, GenerationRequest, Sampling, Token
from stillhouse.backends.sampling import distribution
from stillhouse.r1.errors import UserError

GREEDY = Sampling(temperature=0)
ROUNDING = 1e-3  # natural log: what chunks of another size change in a log-probability, in f32
_ids = itertools.count()

Opener = Callable[..., Backend]


@pytest.fixture(params=["pytorch", "mlx"])
def open_random(request: pytest.FixtureRequest, open_checkpoint: Opener, checkpoint_path: Path) -> Opener:
    return lambda **options: open_checkpoint(request.param, checkpoint_path, **options)


@pytest.fixture
def backend(open_random: Opener) -> Backend:
    return open_random()


def ask(backend: Backend, prompt: str | Sequence[int], max_tokens: int = 8, **fields: Any) -> str:
    prompt_ids = backend.vocabulary.encode(prompt) if isinstance(prompt, str) else prompt
    fields = {"sampling": GREEDY, "ignore_eos": True} | fields
    request = GenerationRequest(id=str(next(_ids)), prompt_ids=prompt_ids, max_tokens=max_tokens, **fields)
    backend.add(request)
    return request.id


def run(backend: Backend, *until: str) -> dict[str, list[Token]]:
    """Step until nothing is left to do, or these have finished; the tokens by request."""
    tokens: dict[str, list[Token]] = {}
    while sum(backend.load()[:2]) or not all(id in tokens and tokens[id][-1].finish for id in until):
        for token in backend.step():
            tokens.setdefault(token.request_id, []).append(token)
    return tokens


def reply(backend: Backend, prompt: str | Sequence[int], max_tokens: int = 8, **fields: Any) -> list[Token]:
    request_id = ask(backend, prompt, max_tokens, **fields)
    return run(backend, request_id)[request_id]


def assert_close(first: list[Token], second: list[Token]) -> None:
    assert ids(first) == ids(second)
    for one, other in zip(first, second, strict=True):
        seen = dict(other.top_logprobs)
        pairs = [(logprob, seen[token_id]) for token_id, logprob in one.top_logprobs[:5]]
        np.testing.assert_allclose(*zip(*pairs, strict=True), atol=ROUNDING)


# Prefixes


def test_the_same_prompt_again_is_read_from_the_cache(backend):
    first, second = [reply(backend, LONG, top_logprobs=20) for _ in range(2)]
    assert [cached(first), cached(second)] == [0, len(LONG) - 1]
    assert_close(first, second)


def test_a_prefix_is_found_in_whatever_reply_it_is(backend):
    for prompt in (LONG, "Once upon a time there was a still. ", "1, 2, 3"):
        reply(backend, prompt)
    assert cached(reply(backend, LONG[:40] + "another thing")) == 40
    assert cached(reply(backend, "Once upon a time there is")) == len("Once upon a time there ")


def test_a_prefix_is_found_in_a_reply_that_is_still_written(open_random):
    alone = ids(reply(open_random(), LONG, 40))
    backend = open_random()
    writing = ask(backend, LONG, 40)
    other = ask(backend, "something else", 40)
    told = backend.step()
    reading = ask(backend, LONG + "more", 2)
    tokens = run(backend)
    assert cached(tokens[reading]) == len(LONG)
    assert ids([token for token in told if token.request_id == writing]) + ids(tokens[writing]) == alone
    assert len(tokens[other]) >= 39


def test_a_reply_is_a_prefix_for_the_next_turn_as_far_as_it_is_the_same(backend):
    """Thoughts that a template strips cut the next prompt right after the user's words."""
    prompt = backend.vocabulary.encode(LONG)
    said = ids(reply(backend, LONG, 20))
    assert cached(reply(backend, [*prompt, *said, 1, 2, 3])) == len(prompt) + 19  # the last token was never read
    assert cached(reply(backend, [*prompt, *said[:10], (said[10] + 1) % 256, 2])) == len(prompt) + 10
    assert cached(reply(backend, [*prompt, 7, 8, 9])) == len(prompt)


def test_what_is_written_after_a_copy_does_not_touch_the_source(backend):
    first = ids(reply(backend, LONG, 30))
    for n in range(5):
        reply(backend, LONG[:50] + str(n) * 20, 20)
    again = reply(backend, backend.vocabulary.encode(LONG) + first[:15], 15)
    assert cached(again) == len(LONG) + 14
    assert ids(again) == first[15:]


def test_replies_to_one_prompt_read_it_once(backend):
    requests = [ask(backend, LONG, 8, sampling=Sampling(seed=n)) for n in range(4)]
    tokens = run(backend)
    assert [cached(tokens[request]) for request in requests] == [0, *[len(LONG) - 1] * 3]
    assert len({tuple(ids(tokens[request])) for request in requests}) == 4


# Chunks


def test_a_long_prompt_is_read_in_chunks_beside_a_reply_that_goes_on(open_random):
    backend = open_random(batch_tokens=32)
    going = ask(backend, "Once upon", 100)
    backend.step()
    long = ask(backend, [n % 250 for n in range(300)], 5)
    steps = [[token.request_id for token in backend.step()] for _ in range(11)]
    assert steps[:8] == [[going]] * 8
    assert long in steps[-1] and all(going in step for step in steps)


def test_chunks_of_any_size_read_the_same(open_random):
    said = [reply(open_random(batch_tokens=size), LONG * 3, 6, top_logprobs=20) for size in (32, 50, 512)]
    assert_close(said[0], said[1])
    assert_close(said[0], said[2])


def test_forced_runs_of_any_length_are_read_like_a_prompt(backend):
    """Short runs are read beside the others, long ones by themselves."""

    class Once:
        def __init__(self, run: Sequence[int]) -> None:
            self._run: tuple[int, ...] | None = tuple(run)

        def wish(self, logits: Any) -> Force | None:
            run, self._run = self._run, None
            return Force(run) if run else None

        def see(self, token_id: int, text: str, finish: Any) -> tuple[None, Any]:
            return None, finish

    forced = [LONG[:length].encode() for length in (1, 3, 4, 5, 40)]
    alone = [ids(reply(backend, list(b"So: " + start), 6)) for start in forced]
    requests = [ask(backend, "So: ", len(start) + 6, steer=Once(start)) for start in forced]
    tokens = run(backend)
    for request, start, said in zip(requests, forced, alone, strict=True):
        assert ids(tokens[request]) == [*start, *said]


# A full cache


def test_when_the_cache_is_full_all_replies_finish_as_if_alone(open_random):
    prompts = ["Once upon a time", "The sea is", "One, two, three"]
    alone = [ids(reply(open_random(context=256), prompt, 200)) for prompt in prompts]
    backend = open_random(context=256, cache_tokens=256, parallel=3)
    requests = [ask(backend, prompt, 200) for prompt in prompts]
    tokens = run(backend)
    assert [ids(tokens[request]) for request in requests] == alone
    assert [token.finish for token in tokens[requests[2]]] == [None] * 199 + ["length"]
    assert [len([t for t in tokens[request] if t.started]) for request in requests] == [1, 1, 1]


def test_never_more_is_kept_than_the_cache_holds(open_random):
    backend = open_random(context=256, cache_tokens=256, parallel=3)
    for n in range(12):
        ask(backend, f"{n} {LONG[n * 7 :]}", 40)
    while sum(backend.load()[:2]):
        backend.step()
        assert backend.load().cache_used <= 256
    assert backend.load().cache_size == 256


def test_a_prompt_for_which_there_is_no_room_waits_until_there_is(open_random):
    backend = open_random(context=256, cache_tokens=256, parallel=4)
    going = ask(backend, "a" * 150, 50)
    backend.step()
    waiting = ask(backend, "b" * 150, 2)
    after = ask(backend, "c" * 10, 2)
    order = [request for request, tokens in run(backend).items() if tokens[-1].finish]
    assert order == [going, waiting, after]


def test_a_cancelled_reply_makes_room(open_random):
    backend = open_random(context=256, cache_tokens=256, parallel=2)
    going, waiting = ask(backend, "a" * 150, 90), ask(backend, "b" * 150, 2)
    backend.step()
    backend.cancel(going)
    assert set(run(backend)) == {waiting}


# Idle work


def test_idle_work_waits_until_nothing_else_is_to_do(backend):
    idle = ask(backend, LONG, 0, idle=True)
    real = ask(backend, "The sea is", 5)
    finished = [token.request_id for _ in range(7) for token in backend.step() if token.finish]
    assert finished == [real, idle]
    assert cached(reply(backend, LONG + "And so", 1)) == len(LONG)


def test_idle_work_is_put_aside_for_real_work_and_goes_on_where_it_was(open_random):
    backend = open_random(batch_tokens=32, parallel=1)
    prompt = [n % 250 for n in range(200)]
    idle = ask(backend, prompt, 0, idle=True)
    for _ in range(3):
        assert backend.step() == []
    real = ask(backend, "The sea is", 4)
    assert [[token.request_id for token in backend.step()] for _ in range(4)] == [[real]] * 4
    rest = [backend.step() for _ in range(4)]
    assert [token.request_id for step in rest for token in step] == [idle]
    assert rest[0] == []  # 200 tokens less 3 x 32, in chunks of 32
    assert cached(reply(backend, [*prompt, 1, 2], 1)) == 200


# What goes wrong


def test_a_model_that_does_not_fit_is_told(open_random, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 100_000)
    with pytest.raises(UserError, match=r"the model needs 0\.0 GB of memory and 0\.0 GB are free"):
        open_random()


def test_a_cache_that_does_not_fit_is_told_with_what_would(open_random, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 4_000_000)
    with pytest.raises(UserError, match=r"a KV cache for 100000 tokens needs .*--cache-tokens \d+ or less"):
        open_random(cache_tokens=100_000)


def test_logits_that_are_no_numbers_are_told(open_checkpoint, random_checkpoint, tmp_path):
    folder = random_checkpoint.write_checkpoint(tmp_path, random_checkpoint.random_model(norm=float("nan")))
    for name in ("pytorch", "mlx"):
        backend = open_checkpoint(name, folder)
        ask(backend, LONG)
        with pytest.raises(BackendFailed, match="logits are not numbers"):
            run(backend)
        assert backend.load()[:3] == (0, 0, 0)


# The sampler against the written reference

SAMPLINGS = {
    "R1's advice": Sampling(temperature=0.6, top_p=0.95),
    "all together": Sampling(temperature=1.3, top_k=30, typical_p=0.95, top_p=0.9, min_p=0.02),
    "all penalties": Sampling(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.4, penalty_last_n=20),
}


class Draws:
    """A steer that forces the start of a reply and keeps the logits that the next token is drawn from."""

    def __init__(self, start: Sequence[int]) -> None:
        self._start: tuple[int, ...] | None = tuple(start) or None
        self.logits: Any = None

    def wish(self, logits: Callable[[], Any]) -> Force | None:
        start, self._start = self._start, None
        if start is None:
            self.logits = logits()
        return Force(start) if start else None

    def see(self, token_id: int, text: str, finish: Any) -> tuple[None, Any]:
        return None, finish


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_tokens_are_drawn_as_the_reference_says(open_random, sampling):
    backend = open_random(parallel=32)
    prompt, start = backend.vocabulary.encode("hello, so it is: ABCA"), list(b"oo, hello oo")
    steers = [Draws(start) for _ in range(300)]
    requests = [
        ask(backend, prompt, len(start) + 1, sampling=replace(sampling, seed=seed), steer=steer, ignore_eos=False)
        for seed, steer in enumerate(steers)
    ]
    tokens = run(backend)
    counts = np.bincount([tokens[request][-1].token_id for request in requests], minlength=backend.vocabulary.size)
    chances = distribution(steers[-1].logits.astype(np.float64), sampling, prompt, start)
    assert not counts[chances == 0].any()
    expected = chances * counts.sum()
    often = expected >= 5
    bins = [*zip(counts[often], expected[often], strict=True), (counts[~often].sum(), expected[~often].sum())]
    surprise = sum((seen - due) ** 2 / due for seen, due in bins if due > 1e-9)
    freedom = max(1, len(bins) - 1)
    assert surprise < freedom + 5 * (2 * freedom) ** 0.5 + 10  # Pearson's chi-square, five deviations


def test_dry_breaks_a_repetition(backend):
    bias = tuple((token_id, 60.0 - 30 * n) for n, token_id in enumerate(b"ab"))
    plain = bytes(ids(reply(backend, "So", 20, sampling=Sampling(temperature=0, logit_bias=bias))))
    dry = bytes(ids(reply(backend, "So", 20, sampling=Sampling(temperature=0, logit_bias=bias, dry_multiplier=50.0))))
    assert plain == b"a" * 20
    assert dry[:4] == b"aaab"


def test_xtc_leaves_the_likeliest_out(backend):
    def drawn(sampling: Sampling) -> set[int]:
        requests = [ask(backend, "So", 1, sampling=replace(sampling, seed=seed)) for seed in range(60)]
        tokens = run(backend)
        return {tokens[request][0].token_id for request in requests}

    likeliest = ids(reply(backend, "So", 1))[0]
    assert likeliest in drawn(Sampling(temperature=3, top_k=3))
    assert likeliest not in drawn(Sampling(temperature=3, top_k=3, xtc_probability=1, xtc_threshold=0.01))
