"""What the llama.cpp backend does beyond the contract: its cache, its chunks, its sampler, and what it refuses.

Mostly on a llama with random weights, which takes a millisecond a step; what only a real model shows is `slow`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from stepping import GREEDY, LONG, ask, cached, ids, reply, run

from stillhouse.backends import machine
from stillhouse.backends.base import BackendFailed, Force, GenerationRequest, LoadOptions, Sampling, Token
from stillhouse.backends.engine import Engine
from stillhouse.backends.llamacpp import LlamaCpp
from stillhouse.backends.llamacpp_sampler import Shortlist
from stillhouse.backends.open import open_backend
from stillhouse.backends.sampling import distribution
from stillhouse.r1.errors import BadModelFile, UserError

ROUNDING = 0.05  # natural log: what chunks of another size change in a log-probability, seen 0.02 with an f16 cache


@pytest.fixture
def llama(open_llama: Callable[..., LlamaCpp], random_path: Path) -> LlamaCpp:
    return open_llama(random_path)


# Prefixes


def test_the_same_prompt_again_is_read_from_the_cache(llama):
    first, second = [reply(llama, LONG, top_logprobs=20) for _ in range(2)]
    assert [cached(first), cached(second)] == [0, len(llama.vocabulary.encode(LONG)) - 1]
    assert ids(first) == ids(second)
    assert_close(first, second)


@pytest.mark.slow
def test_a_real_model_says_the_same_from_the_cache(open_llama, smollm2_path):
    backend = open_llama(smollm2_path, threads=2)
    for prompt in (LONG, LONG * 4, "The sea is"):
        first, second = [reply(backend, prompt, 4, top_logprobs=20) for _ in range(2)]
        assert cached(second) == len(backend.vocabulary.encode(prompt)) - 1
        assert_close(first, second, tolerance=0.15)  # quantized weights meet activations rounded to 8 bits


def assert_close(first: list[Token], second: list[Token], tolerance: float = ROUNDING) -> None:
    for one, other in zip(first, second, strict=True):
        seen = dict(other.top_logprobs)
        pairs = [(logprob, seen[token_id]) for token_id, logprob in one.top_logprobs[:5]]
        np.testing.assert_allclose(*zip(*pairs, strict=True), atol=tolerance)
        if one.token_id != other.token_id:  # after a tie the two go different ways
            break


def test_a_prefix_is_found_in_whatever_sequence_it_is(llama):
    encode = llama.vocabulary.encode
    for prompt in (LONG, "Once upon a time there was a still. ", "1, 2, 3"):
        reply(llama, prompt)
    assert cached(reply(llama, LONG[:40] + "another thing")) == len(encode(LONG[:40]))
    assert cached(reply(llama, "Once upon a time there is")) == len(encode("Once upon a time there "))


def test_a_prefix_is_found_in_a_sequence_that_is_still_written(llama):
    alone = ids(reply(llama, LONG, 40))
    clear(llama)
    writing = ask(llama, LONG, 40)
    llama.step()
    reading = ask(llama, LONG + "more", 2)
    tokens = run(llama)
    assert cached(tokens[reading.id]) == len(llama.vocabulary.encode(LONG))
    assert ids(tokens[writing.id])[:39] == alone[1:]  # its first token came before


def clear(backend: LlamaCpp) -> None:
    """Forget what is cached."""
    with pytest.raises(BackendFailed):
        backend._fail("to begin anew")


def test_a_reply_is_a_prefix_for_the_next_turn_as_far_as_it_is_the_same(llama):
    prompt = llama.vocabulary.encode(LONG)
    said = ids(reply(llama, LONG, 20))
    assert cached(reply(llama, [*prompt, *said, 1, 2, 3])) == len(prompt) + 19  # the last token was never read
    assert cached(reply(llama, [*prompt, *said[:10], (said[10] + 1) % 256, 2])) == len(prompt) + 10


def test_what_is_written_after_a_copy_does_not_touch_the_source(llama):
    encode = llama.vocabulary.encode
    first = ids(reply(llama, LONG, 30))
    for n in range(5):
        reply(llama, LONG[:50] + str(n) * 20, 20)
    again = reply(llama, encode(LONG) + first[:15], 15)
    assert cached(again) == len(encode(LONG)) + 14
    assert ids(again) == first[15:]


def test_replies_to_one_prompt_share_what_is_read(open_llama, random_path):
    for pooled in ({}, {"context": 1024, "cache_tokens": 1500}):
        llama = open_llama(random_path, **pooled)
        prompt = llama.vocabulary.encode(LONG)
        requests = [ask(llama, prompt, 8, sampling=Sampling(seed=n)) for n in range(4)]
        tokens = run(llama)
        assert [cached(tokens[request.id]) for request in requests] == [0, *[len(prompt) - 1] * 3]
        assert len({tuple(ids(tokens[request.id])) for request in requests}) == 4
        assert not pooled or llama.load().cache_used <= len(prompt) + 4 * 8


@pytest.mark.parametrize("parallel", [1, 2], ids=["partitioned", "pooled"])
def test_what_left_the_cache_is_found_in_ram(open_llama, random_path, parallel):
    backend = open_llama(random_path, context=256, cache_tokens=256, parallel=parallel)
    prompts = [chr(65 + n) * 60 for n in range(5)]
    first = [ids(reply(backend, prompt, 2)) for prompt in prompts]
    assert backend.load().cache_used <= 256
    again = [reply(backend, prompt, 2) for prompt in prompts]
    assert [cached(tokens) for tokens in again] == [59] * 5
    assert [ids(tokens) for tokens in again] == first
    assert cached(reply(backend, prompts[2][:40] + "!", 2)) == 40


# Places


def places(backend: LlamaCpp) -> list[int]:
    """Where replies run."""
    return sorted(running.sequence.id for running in backend._line.running if running.sequence)


def test_replies_stay_neighbours_when_others_end(open_llama, random_path):
    """llama.cpp reads all weights once more for every gap among them."""
    backend = open_llama(random_path, context=256, cache_tokens=6 * 256, parallel=6, kv_type="f32")
    prompts = [chr(65 + n) * (20 + n) for n in range(6)]
    lengths = [3, 30, 8, 20, 5, 40]
    alone = [ids(reply(backend, prompt, length)) for prompt, length in zip(prompts, lengths, strict=True)]
    clear(backend)
    requests = [ask(backend, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    said: dict[str, list[Token]] = {request.id: [] for request in requests}
    while backend._line.running or backend._line.waiting:
        backend._admit()
        running = places(backend)
        assert running == list(range(len(running)))
        for token in backend.step():
            said[token.request_id].append(token)
    assert [ids(said[request.id]) for request in requests] == alone


def test_what_another_reply_took_the_place_of_is_found_in_ram(open_llama, random_path):
    backend = open_llama(random_path, context=256, cache_tokens=2 * 256, parallel=2)
    first, second = ask(backend, "a" * 60, 2), ask(backend, "b" * 60, 10)
    tokens = run(backend)
    for other in range(2):  # both places
        reply(backend, str(other) * 60, 2)
    again = {request.id: reply(backend, request.prompt_ids, request.max_tokens) for request in (first, second)}
    assert [cached(again[it.id]) for it in (first, second)] == [59, 59]
    assert [ids(again[it.id]) for it in (first, second)] == [ids(tokens[it.id]) for it in (first, second)]


def test_a_reply_that_is_dear_to_move_stays_where_it_is(open_llama, random_path):
    backend = open_llama(random_path, context=256, cache_tokens=2 * 256, parallel=2)
    backend._cache._dearest_move = 100  # bytes
    ask(backend, "a" * 60, 2)
    long = ask(backend, "b" * 60, 10)
    for _ in range(5):
        backend.step()
    assert places(backend) == [1]
    assert len(run(backend)[long.id]) > 0


# Chunks


def test_a_long_prompt_is_read_in_chunks_beside_a_reply_that_goes_on(open_llama, random_path):
    backend = open_llama(random_path, batch_tokens=32)
    going = ask(backend, "Once upon", 100)
    backend.step()
    long = ask(backend, [n % 250 for n in range(300)], 5)
    steps = [[token.request_id for token in backend.step()] for _ in range(10)]
    assert steps == [*[[going.id]] * 9, [going.id, long.id]]
    run(backend)


def test_chunks_of_any_size_read_the_same(open_llama, random_path):
    said = [reply(open_llama(random_path, batch_tokens=size), LONG * 3, 6, top_logprobs=20) for size in (32, 50, 512)]
    assert ids(said[0]) == ids(said[1]) == ids(said[2])
    assert_close(said[0], said[1])
    assert_close(said[0], said[2])


# A full cache


def test_when_the_cache_is_full_all_replies_finish_as_if_alone(open_llama, random_path):
    """The youngest reply gave its cells up, was let in again at once, and so on for ever."""
    backend = open_llama(random_path, context=256, cache_tokens=256, parallel=3, kv_type="f32")
    prompts = ["Once upon a time", "The sea is", "One, two, three"]
    alone = []
    for prompt in prompts:
        clear(backend)
        alone.append(ids(reply(backend, prompt, 200)))
    clear(backend)
    requests = [ask(backend, prompt, 200) for prompt in prompts]
    tokens = run(backend)
    assert [ids(tokens[request.id]) for request in requests] == alone
    assert [token.finish for token in tokens[requests[2].id]] == [None] * 199 + ["length"]
    assert [len([t for t in tokens[request.id] if t.started]) for request in requests] == [1, 1, 1]


def test_a_prompt_for_which_there_is_no_room_waits_until_there_is(open_llama, random_path):
    backend = open_llama(random_path, context=256, cache_tokens=256, parallel=4)
    going = ask(backend, "a" * 150, 50)
    backend.step()
    waiting = ask(backend, "b" * 150, 2)
    after = ask(backend, "c" * 10, 2)
    order = [request_id for request_id, tokens in run(backend).items() if tokens[-1].finish]
    assert order == [going.id, waiting.id, after.id]


def test_a_cancelled_reply_makes_room(open_llama, random_path):
    backend = open_llama(random_path, context=256, cache_tokens=256, parallel=2)
    going, waiting = ask(backend, "a" * 150, 90), ask(backend, "b" * 150, 2)
    backend.step()
    backend.cancel(going.id)
    assert set(run(backend)) - {going.id} == {waiting.id}


# Idle work


def test_idle_work_waits_until_nothing_else_is_to_do(llama):
    idle = ask(llama, LONG, 0, idle=True)
    real = ask(llama, "The sea is", 5)
    finished = [token.request_id for _ in range(6) for token in llama.step() if token.finish]
    assert finished == [real.id, idle.id]
    assert cached(reply(llama, LONG + "And so", 1)) == len(llama.vocabulary.encode(LONG))


def test_idle_work_is_put_aside_for_real_work_and_goes_on_where_it_was(open_llama, random_path):
    backend = open_llama(random_path, batch_tokens=32, parallel=1)
    prompt = [n % 250 for n in range(200)]
    idle = ask(backend, prompt, 0, idle=True)
    for _ in range(3):
        assert backend.step() == []
    real = ask(backend, "The sea is", 4)
    steps = [[token.request_id for token in backend.step()] for _ in range(4)]
    assert steps == [[real.id]] * 4
    rest = [backend.step() for _ in range(4)]  # 200 tokens less 3 x 32, in chunks of 32
    assert [len(tokens) for tokens in rest] == [0, 0, 0, 1]
    assert rest[-1][0].request_id == idle.id
    assert cached(reply(backend, [*prompt, 1, 2], 1)) == 200


def test_what_idle_work_has_read_is_found_by_real_work(open_llama, random_path):
    backend = open_llama(random_path, batch_tokens=32)
    prompt = [n % 250 for n in range(200)]
    idle = ask(backend, prompt, 0, idle=True)
    backend.step()
    backend.step()
    assert cached(reply(backend, prompt, 1)) == 64
    backend.cancel(idle.id)


def test_idle_work_that_finds_the_cache_full_stays_idle(open_llama, random_path):
    """It came back as work that could not wait."""
    backend = open_llama(random_path, context=256, cache_tokens=256, parallel=2)
    requests = [ask(backend, letter * 100, 80, idle=True) for letter in "ab"]
    while len(backend._line.running) != 1:
        backend.step()
    assert [request.draft.request.id for request in backend._line.idle] == [requests[1].id]
    assert len(run(backend)[requests[1].id]) > 0


def test_a_prompt_that_nobody_waits_for_is_read_too(open_llama, random_path):
    backend = open_llama(random_path)
    prompt = backend.vocabulary.encode(LONG)
    engine = Engine(backend)  # left open: the fixture closes what it would close
    engine.read(GenerationRequest("ahead", prompt, 0, idle=True))
    while not backend.load().cache_used:
        time.sleep(0.001)
    (token,) = engine.generate([GenerationRequest("now", [*prompt, 65], 1)])
    assert token.started and token.started.cached_tokens == len(prompt)


# Options


@pytest.mark.parametrize("kv_type", ["f32", "bf16", "q8_0", "q4_0"])
def test_other_kv_types_read_nearly_the_same(open_llama, random_path, llama, kv_type):
    backend = open_llama(random_path, kv_type=kv_type, flash_attention=True)
    (plain,), (other,) = (reply(each, LONG, 1, top_logprobs=262) for each in (llama, backend))
    apart = np.array([dict(other.top_logprobs)[i] - logprob for i, logprob in plain.top_logprobs[:20]])
    assert np.abs(apart).max() < {"f32": 0.05, "bf16": 0.5, "q8_0": 0.5, "q4_0": 5}[kv_type]
    second = reply(backend, LONG, 1)
    assert cached(second) == len(backend.vocabulary.encode(LONG)) - 1


def test_an_adapter_changes_the_replies_by_its_scale(open_llama, random_path, random_model, tmp_path, llama):
    adapter = random_model.write_adapter(tmp_path / "lora.gguf")
    plain, none, whole = (
        ids(reply(backend, LONG))
        for backend in (
            llama,
            open_llama(random_path, loras=((adapter, 0.0),)),
            open_llama(random_path, loras=((adapter, 1.0),)),
        )
    )
    assert plain == none
    assert plain != whole


# What it refuses

REFUSALS = {
    "more context than trained for": ({"context": 4096}, UserError, r"--context 4096 is more than the 2048 tokens"),
    "no such KV type": ({"kv_type": "q3"}, UserError, r"no KV cache type 'q3'.*q8_0"),
    "no such adapter": ({"loras": ((Path("no.gguf"), 1.0),)}, BadModelFile, r"there is no LoRA adapter no\.gguf"),
    "a quantized cache without flash attention": (
        {"kv_type": "q8_0", "flash_attention": False},
        UserError,
        r"cannot make a context of \d+ tokens: quantized V cache requires flash_attn",
    ),
}


@pytest.mark.parametrize(("options", "kind", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_had_is_told_before_anything_is_taken(open_llama, random_path, options, kind, message):
    with pytest.raises(kind, match=message):
        open_llama(random_path, **options)


def test_a_file_that_is_no_adapter_is_told(open_llama, random_path):
    with pytest.raises(BadModelFile, match=r"cannot load the LoRA adapter random\.gguf: .*made for this very model"):
        open_llama(random_path, loras=((random_path, 1.0),))


def test_a_file_that_is_cut_short_is_told(random_path, tmp_path):
    for length in (0, 3, 100, 20_000, random_path.stat().st_size - 1):
        short = tmp_path / f"{length}.gguf"
        short.write_bytes(random_path.read_bytes()[:length])
        with pytest.raises(BadModelFile, match=rf"{length}\.gguf"):
            open_backend([short], LoadOptions(threads=1))


def test_a_vocabulary_without_weights_is_told(r1_vocabulary_path):
    with pytest.raises(BadModelFile, match="holds a vocabulary and no weights"):
        open_backend([r1_vocabulary_path], LoadOptions())


# Keys and values of one token of the random llama, f16: 2 blocks x 64 wide x 2 x 2 bytes
PER_TOKEN = 512


def test_a_model_that_does_not_fit_is_told(open_llama, random_path, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 100_000)
    with pytest.raises(UserError, match=r"the model needs 0\.0 GB of memory and 0\.0 GB are free"):
        open_llama(random_path)


def test_a_cache_that_does_not_fit_is_told_with_what_would(open_llama, random_path, monkeypatch):
    weights = random_path.stat().st_size
    monkeypatch.setattr(machine, "free_memory", lambda: int(weights * 1.05) + 1100 * PER_TOKEN)
    with pytest.raises(UserError, match=r"a KV cache for 2048 tokens needs .*--context 1024 or less") as told:
        open_llama(random_path, context=2048)
    assert "--kv-type q8_0" in str(told.value)
    assert open_llama(random_path, context=1024).context_length == 1024


def test_a_context_that_nobody_asked_for_is_made_to_fit(open_llama, random_path, monkeypatch):
    weights = random_path.stat().st_size
    monkeypatch.setattr(machine, "free_memory", lambda: int(weights * 1.05) + 1100 * PER_TOKEN)
    assert open_llama(random_path, context=None).context_length == 1024
    monkeypatch.undo()
    assert open_llama(random_path, context=None).context_length == 2048


# What goes wrong later


def test_a_failed_decode_is_told_and_forgotten(llama, monkeypatch):
    before = ids(reply(llama, LONG))
    ask(llama, LONG)
    with monkeypatch.context() as patched:
        patched.setattr(llama_cpp, "llama_decode", lambda *_: -3)
        with pytest.raises(BackendFailed, match="llama_decode failed with status -3"):
            llama.step()
    assert llama.load()[:3] == (0, 0, 0)
    after = reply(llama, LONG)
    assert (cached(after), ids(after)) == (0, before)


def test_logits_that_are_no_numbers_are_told(open_llama, random_model, tmp_path):
    backend = open_llama(random_model.write_model(tmp_path / "nan.gguf", norm=float("nan")))
    ask(backend, LONG)
    with pytest.raises(BackendFailed, match="logits are not numbers"):
        backend.step()
    assert backend.load()[:3] == (0, 0, 0)


# The sampler against the written reference

SAMPLINGS = {
    "as it is": Sampling(),
    "hot": Sampling(temperature=1.7),
    "R1's advice": Sampling(temperature=0.6, top_p=0.95),
    "top-k": Sampling(top_k=7),
    "top-k and hot": Sampling(temperature=2, top_k=7),
    "top-p": Sampling(top_p=0.7),
    "top-p keeps one": Sampling(top_p=0.01),
    "min-p": Sampling(min_p=0.1),
    "min-p and hot": Sampling(temperature=2, min_p=0.2),
    "typical": Sampling(typical_p=0.6),
    "all together": Sampling(temperature=1.3, top_k=30, typical_p=0.95, top_p=0.9, min_p=0.02),
    "repetition": Sampling(repetition_penalty=1.8),
    "repetition, a short memory": Sampling(repetition_penalty=3, penalty_last_n=5),
    "a reward for repetition": Sampling(repetition_penalty=0.6),
    "presence": Sampling(presence_penalty=1.5),
    "frequency": Sampling(frequency_penalty=0.9),
    "all penalties": Sampling(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.4, penalty_last_n=20),
    "no memory": Sampling(repetition_penalty=2, presence_penalty=2, penalty_last_n=0),
    "logit bias": Sampling(logit_bias=((65, 4.0), (66, -100.0), (67, 2.5))),
    "logit bias and top-k": Sampling(temperature=0.5, top_k=2, logit_bias=((65, 30.0), (67, 29.5))),
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


def draw(backend: LlamaCpp, prompt: Sequence[int], start: Sequence[int], sampling: Sampling, draws: int) -> Any:
    """The logits after `prompt` and `start`, and how often which token was drawn from them."""
    steers = [Draws(start) for _ in range(draws)]
    requests = [
        ask(backend, prompt, len(start) + 1, sampling=replace(sampling, seed=seed), steer=steer, ignore_eos=False)
        for seed, steer in enumerate(steers)
    ]
    tokens = run(backend)
    drawn = [tokens[request.id][-1].token_id for request in requests]
    return steers[-1].logits, np.bincount(drawn, minlength=backend.vocabulary.size)


def assert_drawn_from(chances: Any, counts: Any) -> None:
    """Nothing impossible was drawn, and what was is within five deviations by Pearson's chi-square."""
    assert not counts[chances == 0].any()
    expected = chances * counts.sum()
    often = expected >= 5
    bins = [*zip(counts[often], expected[often], strict=True), (counts[~often].sum(), expected[~often].sum())]
    surprise = sum((seen - due) ** 2 / due for seen, due in bins if due > 1e-9)
    freedom = max(1, len(bins) - 1)
    assert surprise < freedom + 5 * (2 * freedom) ** 0.5 + 10


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_tokens_are_drawn_as_the_reference_says(open_llama, random_path, sampling):
    backend = open_llama(random_path, parallel=32, kv_type="f32")
    prompt, start = backend.vocabulary.encode("hello, so it is: ABCA"), list(b"oo, hello oo")
    logits, counts = draw(backend, prompt, start, sampling, 600)
    assert_drawn_from(distribution(logits.astype(np.float64), sampling, prompt, start), counts)


@pytest.mark.slow
def test_a_real_models_tokens_are_drawn_as_the_reference_says(open_llama, smollm2_path):
    backend = open_llama(smollm2_path, threads=2, parallel=32)
    sampling = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.1)
    prompt = backend.vocabulary.encode("My favourite food is")
    logits, counts = draw(backend, prompt, [], sampling, 320)
    chances = distribution(logits.astype(np.float64), sampling, prompt, [])
    counts[(chances == 0) & (counts <= 1)] = 0  # the last bits may move the edge of the nucleus by a token
    assert_drawn_from(chances, counts)


@pytest.mark.parametrize("size", [5, 256, 49_152])
def test_what_leaves_nothing_out_is_drawn_by_where_a_number_falls_among_all_chances(size):
    chance = np.random.default_rng(size)
    logits = chance.normal(0, 2, size).astype(np.float32)
    logits[[1, size - 1]] = -np.inf
    ends = np.cumsum(distribution(logits.astype(np.float64), Sampling(temperature=0.8), [], []))
    shortlist = Shortlist(size)
    for number in (0.0, *chance.random(500), 1 - 2**-53):
        token_id = shortlist.draw(logits, 0.8, number)
        assert logits[token_id] > -np.inf
        begin = ends[token_id - 1] if token_id else 0.0
        assert begin - 1e-5 <= number <= ends[token_id] + 1e-5


def test_greedy_is_the_likeliest_token_every_time(open_llama, random_path):
    backend = open_llama(random_path, parallel=8)
    for sampling in (GREEDY, Sampling(temperature=0, repetition_penalty=1.5, logit_bias=((70, 3.0),), top_p=0.1)):
        prompt = backend.vocabulary.encode("hello, so it is: ABCA")
        logits, counts = draw(backend, prompt, [], sampling, 24)
        reference = distribution(logits.astype(np.float64), sampling, prompt, [])
        assert counts.tolist() == (24 * reference).tolist()


def test_dry_breaks_a_repetition(llama):
    bias = tuple((token_id, 60.0 - 30 * n) for n, token_id in enumerate(b"ab"))
    plain = bytes(ids(reply(llama, "So", 20, sampling=Sampling(temperature=0, logit_bias=bias))))
    dry = bytes(ids(reply(llama, "So", 20, sampling=Sampling(temperature=0, logit_bias=bias, dry_multiplier=50.0))))
    assert plain == b"a" * 20
    assert dry[:4] == b"aaab"


def test_xtc_leaves_the_likeliest_out(llama):
    prompt, xtc = llama.vocabulary.encode("So"), Sampling(top_k=3, xtc_probability=1, xtc_threshold=0.01)
    logits, plain = draw(llama, prompt, [], Sampling(top_k=3), 100)
    _, cut = draw(llama, prompt, [], xtc, 100)
    assert plain[logits.argmax()] > 0
    assert cut[logits.argmax()] == 0
