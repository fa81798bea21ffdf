"""Draws the tokens of one reply from rows of logits that lie in RAM, in the order that `sampling.py` lays down.

Costs by what a request asks for: penalties and biases touch only the tokens that they concern, and a nucleus is
measured among the likely tokens only (its mass to 1 in 10,000). Knows nothing of any runtime.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .base import Force, Forget, GenerationRequest, Only, Sampling, Token, Vocabulary
from .draft import Draft
from .sampling import log_softmax, mask_to, seed32

Row = NDArray[np.float32]
_LOST_MASS = 1e-4  # of all probability, at most, that is not looked at when a nucleus is measured
_DRY_BREAKERS = (b"\n", b":", b'"', b"*")  # koboldcpp's: a repetition does not run on across these
_MOST_REPEATED = 64  # tokens over the allowed length: more make no difference to DRY, so strong is it by then


class Breakers:
    """The tokens at which DRY's repetitions end; looked for when they are first wanted."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    @cached_property
    def is_breaker(self) -> NDArray[np.bool_]:
        """For every token, (vocabulary,), whether its text has a breaker in it."""
        pieces = map(self._vocabulary.piece, range(self._vocabulary.size))
        return np.array([any(text in piece for text in _DRY_BREAKERS) for piece in pieces], bool)


class RowSampler:
    """Draws the tokens of one reply."""

    __slots__ = ("_biased", "_biases", "_breakers", "_forgotten", "_prompt_ids", "_random", "_reply_ids", "_sampling")

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary, breakers: Breakers) -> None:
        self._sampling = sampling = request.sampling
        biases = dict(sampling.logit_bias)
        if request.ignore_eos:
            biases.update(dict.fromkeys(vocabulary.end_ids, -math.inf))
        self._biased = np.array(list(biases), np.intp)
        self._biases = np.array(list(biases.values()), np.float32)
        self._breakers = breakers
        most = max(sampling.penalty_last_n, sampling.dry_penalty_last_n, 1)
        self._prompt_ids: list[int] = list(request.prompt_ids[-most:])
        self._reply_ids: list[int] = []
        self._forgotten = 0  # tokens at the start of the reply that penalties don't count
        self._random = np.random.default_rng(seed32(sampling.seed))

    def draw(self, logits: Row) -> int:
        """The next token, from one row of logits, (vocabulary,); the row stays as it is."""
        row = self._penalized(logits)
        sampling = self._sampling
        if sampling.temperature <= 0:
            return int(row.argmax())
        ids, chances = self._candidates(row)
        if sampling.xtc_probability > 0:
            ids, chances = self._without_top_choices(ids, chances)
        cumulative = np.cumsum(chances, dtype=np.float64)
        place = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(place, ids.size - 1)])

    def accept(self, token_id: int) -> None:
        """Remember a token of the reply, drawn or forced."""
        self._reply_ids.append(token_id)

    def forget(self) -> None:
        """Have penalties count the prompt only, as at the start."""
        self._forgotten = len(self._reply_ids)

    # Penalties

    def _penalized(self, logits: Row) -> Row:
        sampling, said = self._sampling, self._reply_ids[self._forgotten :]
        row = logits
        if self._biased.size:
            row = row.copy()
            row[self._biased] += self._biases
        window = sampling.penalty_last_n
        if window > 0 and sampling.repetition_penalty != 1:
            past = self._past(said, window)
            row = row.copy()
            repeated, factor = row[past], np.float32(sampling.repetition_penalty)
            row[past] = np.where(repeated <= 0, repeated * factor, repeated / factor)
        if window > 0 and said and (sampling.presence_penalty or sampling.frequency_penalty):
            occurred, counts = np.unique(said[-window:], return_counts=True)
            row = row.copy()
            row[occurred] -= (counts * sampling.frequency_penalty + sampling.presence_penalty).astype(np.float32)
        if sampling.dry_multiplier and sampling.dry_penalty_last_n > 0:
            ids, losses = dry(self._past(said, sampling.dry_penalty_last_n), sampling, self._breakers.is_breaker)
            row = row.copy()
            row[ids] -= losses
        return row

    def _past(self, said: Sequence[int], window: int) -> NDArray[np.intp]:
        """The last tokens of prompt and reply together."""
        before = self._prompt_ids[-(window - len(said)) :] if len(said) < window else []
        return np.array([*before, *said[-window:]], np.intp)

    # What is drawn from

    def _candidates(self, row: Row) -> tuple[NDArray[np.intp], Row]:
        """The tokens that the truncations leave, and their chances: not yet divided by their sum."""
        sampling = self._sampling
        best = row.max()
        ids = self._shortlist(row, float(best))
        weights = np.exp((row[ids] - best) * np.float32(1 / sampling.temperature))
        if sampling.typical_p < 1:
            chances = weights.astype(np.float64) / weights.sum(dtype=np.float64)
            surprise = -np.log(np.maximum(chances, 1e-300))
            order = np.argsort(np.abs(surprise - (chances * surprise).sum()), kind="stable")
            ids, weights = _up_to_mass(ids, weights, order, sampling.typical_p)
        if sampling.top_p < 1:
            ids, weights = _nucleus(ids, weights, sampling.top_p)
        if sampling.min_p > 0:
            likely = weights >= np.float32(sampling.min_p) * weights.max()
            ids, weights = ids[likely], weights[likely]
        return ids, weights

    def _shortlist(self, row: Row, best: float) -> NDArray[np.intp]:
        """Where the likely tokens are all that matters: those; else every token that is possible at all."""
        sampling = self._sampling
        least = -math.inf
        if 0 < sampling.top_k < row.size:
            least = float(np.partition(row, -sampling.top_k)[-sampling.top_k])
        elif sampling.top_p < 1 and sampling.typical_p >= 1:
            least = best - sampling.temperature * math.log(row.size / _LOST_MASS)
        return np.flatnonzero(row >= least) if least > -math.inf else np.flatnonzero(row > -math.inf)

    def _without_top_choices(self, ids: NDArray[np.intp], chances: Row) -> tuple[NDArray[np.intp], Row]:
        """XTC: of the tokens that are good choices, now and then, only the least likely."""
        sampling = self._sampling
        if self._random.random() >= sampling.xtc_probability or sampling.xtc_threshold > 0.5:
            return ids, chances
        good = np.flatnonzero(chances >= sampling.xtc_threshold * chances.sum())
        if good.size < 2:
            return ids, chances
        keep = np.ones(ids.size, bool)
        keep[good] = False
        keep[good[chances[good].argmin()]] = True
        return ids[keep], chances[keep]


def dry(
    past: NDArray[np.intp], sampling: Sampling, is_breaker: NDArray[np.bool_]
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """DRY: the tokens that would go on with a repetition, and what each loses by the length of what is repeated.

    `past` are the last tokens of prompt and reply; `is_breaker`, (vocabulary,), where a repetition does not run on.
    """
    allowed = sampling.dry_allowed_length
    lengths: dict[int, int] = {}  # token that went on before -> longest repetition
    places = np.flatnonzero(past[:-1] == past[-1:])  # where what was just said was said before
    if past.size and is_breaker[past[-1]]:
        places = places[:0]
    for length in range(1, allowed + _MOST_REPEATED):
        if not places.size:
            break
        if length >= allowed:
            lengths.update(dict.fromkeys(past[places + 1].tolist(), length))
        before = past.size - 1 - length
        if before < 0 or is_breaker[past[before]]:
            break
        places = places[places >= length]
        places = places[past[places - length] == past[before]]
    ids = np.array([token_id for token_id in lengths if not is_breaker[token_id]], np.intp)
    over = np.array([lengths[int(token_id)] for token_id in ids], np.float64) - allowed
    return ids, (sampling.dry_multiplier * sampling.dry_base**over).astype(np.float32)


def next_tokens(draft: Draft, sampler: RowSampler, logits: Row) -> list[Token]:
    """What a reply says next, one at least: a token that is drawn, or those its steer forces.

    `logits`, (vocabulary,), are the model's own.
    """
    tokens: list[Token] = []
    while not tokens:
        wish = draft.wish(logits.copy)
        if isinstance(wish, Force):
            tokens = draft.force(wish.token_ids)
        elif isinstance(wish, Forget):
            sampler.forget()
        else:
            logprobs = None if draft.request.top_logprobs is None else log_softmax(logits)
            row = logits
            if isinstance(wish, Only):
                row = logits.copy()  # the steer may overrule what is drawn, and ask for something else
                mask_to(row, wish.bits)
            token = draft.take(sampler.draw(row), logprobs)
            tokens = [token] if token else []
    for token in tokens:
        sampler.accept(token.token_id)
    return tokens


def _nucleus(ids: NDArray[np.intp], weights: Row, mass: float) -> tuple[NDArray[np.intp], Row]:
    total = weights.sum(dtype=np.float64)
    for least in (1e-4, 0.0):  # sort as few as possible: those above mostly hold the mass
        likely = np.flatnonzero(weights >= least)
        if weights[likely].sum(dtype=np.float64) >= mass * total:
            break
    order = likely[np.argsort(-weights[likely], kind="stable")]
    return _up_to_mass(ids, weights, order, mass)


def _up_to_mass(
    ids: NDArray[np.intp], weights: Row, order: NDArray[np.intp], mass: float
) -> tuple[NDArray[np.intp], Row]:
    """The first of `order` that together have `mass` of all weight, the one that reaches it included."""
    cumulative = np.cumsum(weights[order], dtype=np.float64)
    chosen = order[: int(np.searchsorted(cumulative, mass * weights.sum(dtype=np.float64))) + 1]
    return ids[chosen], weights[chosen]
