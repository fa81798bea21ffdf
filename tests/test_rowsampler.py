"""What `rowsampler.py` promises: it draws as the written reference says, from a row of logits, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillhouse.backends.base import Force, Forget, GenerationRequest, Only, Sampling
from stillhouse.backends.draft import Draft
from stillhouse.backends.echo import EchoVocabulary
from stillhouse.backends.rowsampler import Breakers, RowSampler, dry, next_tokens
from stillhouse.backends.sampling import distribution

VOCABULARY = EchoVocabulary()
PROMPT, REPLY = list(b"hello, so it is: ABCA"), list(b"oo, hello oo")
LOGITS = (np.random.default_rng(3).standard_normal(VOCABULARY.size) * 3).astype(np.float32)

SAMPLINGS = {
    "as it is": Sampling(),
    "hot": Sampling(temperature=1.7),
    "R1's advice": Sampling(temperature=0.6, top_p=0.95),
    "top-k": Sampling(top_k=7),
    "top-k and hot": Sampling(temperature=2, top_k=7),
    "top-k of more than there are": Sampling(top_k=10_000),
    "top-p": Sampling(top_p=0.7),
    "top-p and very hot": Sampling(temperature=5, top_p=0.9),
    "top-p keeps one": Sampling(top_p=0.01),
    "min-p": Sampling(min_p=0.1),
    "min-p and hot": Sampling(temperature=2, min_p=0.2),
    "typical": Sampling(typical_p=0.6),
    "typical and top-p": Sampling(typical_p=0.7, top_p=0.7),
    "all together": Sampling(temperature=1.3, top_k=30, typical_p=0.95, top_p=0.9, min_p=0.02),
    "repetition": Sampling(repetition_penalty=1.8),
    "repetition, a short memory": Sampling(repetition_penalty=3, penalty_last_n=5),
    "repetition, a memory into the prompt": Sampling(repetition_penalty=3, penalty_last_n=15),
    "a reward for repetition": Sampling(repetition_penalty=0.6),
    "presence": Sampling(presence_penalty=1.5),
    "frequency": Sampling(frequency_penalty=0.9),
    "all penalties": Sampling(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.4, penalty_last_n=20),
    "no memory": Sampling(repetition_penalty=2, presence_penalty=2, penalty_last_n=0),
    "logit bias": Sampling(logit_bias=((65, 4.0), (66, -100.0), (67, 2.5))),
    "logit bias and top-k": Sampling(temperature=0.5, top_k=2, logit_bias=((65, 30.0), (67, 29.5))),
}


def sampler(sampling: Sampling, said: Sequence[int] = (), **fields: Any) -> RowSampler:
    request = GenerationRequest("1", PROMPT, 100, sampling=sampling, **fields)
    made = RowSampler(request, VOCABULARY, Breakers(VOCABULARY))
    for token_id in said:
        made.accept(token_id)
    return made


def counts(drawer: RowSampler, draws: int, logits: Any = LOGITS) -> Any:
    return np.bincount([drawer.draw(logits) for _ in range(draws)], minlength=VOCABULARY.size)


def assert_drawn_from(chances: Any, drawn: Any) -> None:
    """Nothing impossible was drawn, and what was is within five deviations by Pearson's chi-square."""
    assert not drawn[chances == 0].any()
    expected = chances * drawn.sum()
    often = expected >= 5
    bins = [*zip(drawn[often], expected[often], strict=True), (drawn[~often].sum(), expected[~often].sum())]
    surprise = sum((seen - due) ** 2 / due for seen, due in bins if due > 1e-9)
    freedom = max(1, len(bins) - 1)
    assert surprise < freedom + 5 * (2 * freedom) ** 0.5 + 10


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_tokens_are_drawn_as_the_reference_says(sampling):
    drawn = counts(sampler(replace(sampling, seed=1), REPLY), 3000)
    assert_drawn_from(distribution(LOGITS.astype(np.float64), sampling, PROMPT, REPLY), drawn)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_greedy_is_the_likeliest_token_of_the_reference(sampling):
    greedy = replace(sampling, temperature=0)
    chances = distribution(LOGITS.astype(np.float64), greedy, PROMPT, REPLY)
    assert sampler(greedy, REPLY).draw(LOGITS) == chances.argmax()


def test_the_row_stays_as_it_is():
    before = LOGITS.copy()
    everything = Sampling(
        repetition_penalty=2, presence_penalty=1, dry_multiplier=1, logit_bias=((1, 2.0),), xtc_probability=1
    )
    sampler(everything, REPLY, ignore_eos=True).draw(LOGITS)
    assert (before == LOGITS).all()


def test_an_ignored_end_is_never_drawn():
    end = min(VOCABULARY.end_ids)
    row = LOGITS.copy()
    row[end] = 50
    assert sampler(Sampling(temperature=0)).draw(row) == end
    assert not counts(sampler(Sampling(temperature=5, seed=1), ignore_eos=True), 2000, row)[end]


def test_equal_seeds_draw_the_same_and_others_not():
    said = [sampler(Sampling(seed=seed)).draw(LOGITS * 0.1) for seed in (1, 1, 2, 3, 4)]
    assert said[0] == said[1]
    assert len(set(said)) > 2


def test_what_was_forgotten_is_not_penalized():
    drawer = sampler(Sampling(presence_penalty=1.5, repetition_penalty=1.3, seed=2), REPLY)
    drawer.forget()
    drawer.accept(REPLY[0])
    plain = Sampling(presence_penalty=1.5, repetition_penalty=1.3)
    chances = distribution(LOGITS.astype(np.float64), plain, PROMPT, REPLY[:1])
    assert_drawn_from(chances, counts(drawer, 3000))


def test_xtc_leaves_out_all_good_choices_but_the_least():
    row = np.full(VOCABULARY.size, -20, np.float32)
    row[[65, 66, 67, 68]] = np.log([0.5, 0.3, 0.15, 0.05])
    always = counts(sampler(Sampling(xtc_probability=1, xtc_threshold=0.1, seed=1)), 500, row)
    assert set(np.flatnonzero(always)) == {67, 68}
    never = counts(sampler(Sampling(xtc_probability=1, xtc_threshold=0.51, seed=1)), 500, row)
    assert never[65] > 200
    half = counts(sampler(Sampling(xtc_probability=0.5, xtc_threshold=0.1, seed=1)), 2000, row)
    assert 400 < half[65] < 600


NEVER = np.zeros(VOCABULARY.size, bool)
DRY = {  # what was said, and what the next token loses where it goes on with it
    "nothing said": (b"", {}),
    "nothing repeated": (b"abcd", {}),
    "one token may repeat": (b"xay a", {}),
    "two tokens": (b"xaby ab", {ord("y"): 1.0}),
    "three tokens": (b"xabcy abc", {ord("y"): 2.0}),
    "the longest counts": (b"abc1 bc2 abc", {ord("1"): 2.0, ord("2"): 1.0}),
    "a run of one": (b"aaaa", {ord("a"): 2.0}),
    "up to the start": (b"abzab", {ord("z"): 1.0}),
}


@pytest.mark.parametrize(("said", "losses"), DRY.values(), ids=DRY)
def test_dry_takes_by_the_length_of_what_is_repeated(said, losses):
    sampling = Sampling(dry_multiplier=1, dry_base=2, dry_allowed_length=2)
    ids, taken = dry(np.array(list(said), np.intp), sampling, NEVER)
    assert dict(zip(ids.tolist(), taken.tolist(), strict=True)) == losses


def test_a_repetition_does_not_run_on_across_a_breaker():
    sampling, breaks = Sampling(dry_multiplier=1, dry_base=2), Breakers(VOCABULARY).is_breaker
    assert np.flatnonzero(breaks).tolist() == sorted(b'\n:"*')
    ids, taken = dry(np.array(list(b"p:ab1 p:ab"), np.intp), sampling, breaks)
    assert (ids.tolist(), taken.tolist()) == ([ord("1")], [1.0])
    assert dry(np.array(list(b"ab\n ab\n"), np.intp), sampling, breaks)[0].size == 0
    assert dry(np.array(list(b"ab\n ab"), np.intp), sampling, breaks)[0].size == 0


class Wishes:
    def __init__(self, *wishes: Any) -> None:
        self._wishes = iter(wishes)
        self.shown: list[Any] = []

    def wish(self, logits: Any) -> Any:
        self.shown.append(logits())
        return next(self._wishes, None)

    def see(self, token_id: int, text: str, finish: Any) -> tuple[None, Any]:
        return None, None  # the model's own end is overruled


def test_after_an_overruled_end_the_mask_before_it_is_forgotten():
    """The mask stayed in the logits, and the end that it allowed was drawn for ever."""
    end = min(VOCABULARY.end_ids)
    bits = np.zeros(-(-VOCABULARY.size // 32), np.uint32)
    bits[end // 32] = 1 << (end % 32)
    steer = Wishes(Only(bits), Forget(), None)
    request = GenerationRequest("1", PROMPT, 100, sampling=Sampling(temperature=0), steer=steer)
    draft = Draft(request, VOCABULARY, 1000)
    (token,) = next_tokens(draft, RowSampler(request, VOCABULARY, Breakers(VOCABULARY)), LOGITS.copy())
    assert token.token_id == LOGITS.argmax()
    assert all((row == LOGITS).all() for row in steer.shown)


def test_forced_tokens_come_all_at_once():
    steer = Wishes(Force((1, 2, 3)))
    request = GenerationRequest("1", PROMPT, 100, steer=steer)
    draft = Draft(request, VOCABULARY, 1000)
    tokens = next_tokens(draft, RowSampler(request, VOCABULARY, Breakers(VOCABULARY)), LOGITS.copy())
    assert [token.token_id for token in tokens] == [1, 2, 3]
