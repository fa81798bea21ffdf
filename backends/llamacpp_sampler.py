"""One sampler chain of llama.cpp per request, in the order that `sampling.py` lays down.

A chain costs by the candidate: over a whole vocabulary, its softmax and sorting take longer than all else that a token
costs outside `llama_decode`. So the likeliest tokens are shortlisted first where that is as good: the likeliest of all
for a temperature of 0, the nucleus for top-p; and where nothing is left out, as in training, the token drawn.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# llama-cpp-python's stubs make every handle optional and every integer a C type.

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence

import llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from .base import GenerationRequest
from .llamacpp_vocabulary import LlamaVocabulary
from .sampling import seed32

Row = NDArray[np.float32]
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
_BLOCK = 256  # tokens whose weights are added up at once
_DRY_BREAKERS = ("\n", ":", '"', "*")  # koboldcpp's: a repetition does not run on across these


class LlamaSampler:
    """Draws the tokens of one reply, by a chain in C or by one number among all chances."""

    __slots__ = (
        "_array", "_biased", "_biases", "_candidates", "_chain", "_memories", "_random", "_shortlist", "_temperature",
        "_top_p",
    )  # fmt: skip

    def __init__(self, vocabulary: LlamaVocabulary, request: GenerationRequest, shortlist: Shortlist) -> None:
        self._shortlist = shortlist
        self._chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        self._memories: list[tuple[C.llama_sampler_p, Sequence[int]]] = []
        sampling, seed = request.sampling, seed32(request.sampling.seed)
        self._make_room(64)
        biases = dict(sampling.logit_bias)
        if request.ignore_eos:
            biases.update(dict.fromkeys(vocabulary.end_ids, float("-inf")))
        self._biased = np.array(list(biases), np.intp)
        self._biases = np.array(list(biases.values()), np.float32)
        last_n = sampling.penalty_last_n
        if sampling.repetition_penalty != 1 and last_n:
            factor = C.llama_sampler_init_penalties(vocabulary.size, last_n, sampling.repetition_penalty, 0.0, 0.0)
            self._add_memory(factor, request.prompt_ids[-last_n:])
        if (sampling.presence_penalty or sampling.frequency_penalty) and last_n:
            frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
            self._add_memory(C.llama_sampler_init_penalties(vocabulary.size, last_n, 1.0, frequency, presence))
        if sampling.dry_multiplier and sampling.dry_penalty_last_n:
            breakers = (ctypes.c_char_p * len(_DRY_BREAKERS))(*(text.encode() for text in _DRY_BREAKERS))
            dry = C.llama_sampler_init_dry(
                vocabulary.handle,
                sampling.dry_multiplier,
                sampling.dry_base,
                sampling.dry_allowed_length,
                sampling.dry_penalty_last_n,
                breakers,
                len(_DRY_BREAKERS),
            )
            self._add_memory(dry, request.prompt_ids[-sampling.dry_penalty_last_n :])
        # Penalties change logits inside the chain: nothing can be shortlisted before them.
        plain = C.llama_sampler_chain_n(self._chain) == 0 and sampling.top_k <= 0 and sampling.typical_p >= 1
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p if plain and (sampling.top_p < 1 or sampling.temperature <= 0) else None
        everything = plain and self._top_p is None and sampling.min_p <= 0 and sampling.xtc_probability <= 0
        self._random = random.Random(seed) if everything else None
        if everything:  # the chain would have nothing to do
            return
        if sampling.temperature <= 0:
            self._add(C.llama_sampler_init_greedy())
            return
        if sampling.temperature != 1:
            self._add(C.llama_sampler_init_temp(sampling.temperature))
        if sampling.top_k > 0:
            self._add(C.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical_p < 1:
            self._add(C.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p < 1 and self._top_p is None:
            self._add(C.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            self._add(C.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.xtc_probability > 0:
            self._add(C.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 1, seed))
        self._add(C.llama_sampler_init_dist(seed))

    @property
    def has_biases(self) -> bool:
        """Whether `sample` adds something to the logits that it is given."""
        return self._biased.size > 0

    def sample(self, context: C.llama_context_p, place: int, logits: Row) -> int:
        """Draw from the logits of one place in the batch, and remember the token.

        `logits`, (vocabulary,), is llama.cpp's own row of that place: biases are added to it where it lies.
        """
        if self.has_biases:
            logits[self._biased] += self._biases
        if self._random is not None:
            return self._shortlist.draw(logits, self._temperature, self._random.random())
        if self._top_p is None:
            return C.llama_sampler_sample(self._chain, context, place)
        ids = self._shortlist.find(logits, self._temperature, self._top_p)
        if ids.size > self._candidates.size:
            self._make_room(2 * ids.size)
        candidates, array = self._candidates[: ids.size], self._array
        candidates["id"], candidates["logit"] = ids, logits[ids]
        array.size, array.selected, array.sorted = ids.size, -1, False
        C.llama_sampler_apply(self._chain, ctypes.byref(array))
        token_id = array.data[array.selected].id
        C.llama_sampler_accept(self._chain, token_id)
        return token_id

    def accept(self, token_id: int) -> None:
        """Remember a token that was not drawn."""
        C.llama_sampler_accept(self._chain, token_id)

    def forget(self) -> None:
        """Have penalties count the prompt only, as at the start."""
        for sampler, past_ids in self._memories:
            C.llama_sampler_reset(sampler)
            for token_id in past_ids:
                C.llama_sampler_accept(sampler, token_id)

    def close(self) -> None:
        """Free the chain. Nothing may be called after it."""
        C.llama_sampler_free(self._chain)

    def _make_room(self, count: int) -> None:
        """Have room for so many candidates; it is kept, since a pointer costs more to make than to use."""
        self._candidates = np.empty(count, _CANDIDATE)
        self._array = C.llama_token_data_array(data=self._candidates.ctypes.data_as(C.llama_token_data_p))

    def _add(self, sampler: C.llama_sampler_p) -> None:
        C.llama_sampler_chain_add(self._chain, sampler)

    def _add_memory(self, sampler: C.llama_sampler_p, past_ids: Sequence[int] = ()) -> None:
        """Add a sampler that goes by what was said before, and tell it."""
        self._memories.append((sampler, past_ids))
        for token_id in past_ids:
            C.llama_sampler_accept(sampler, token_id)
        self._add(sampler)


class Shortlist:
    """Finds the likeliest tokens of rows of logits, or draws from all; its memory serves one row after the other."""

    __slots__ = ("_blocks", "_is_likely", "_ones", "_weights")

    def __init__(self, vocabulary_size: int) -> None:
        whole_blocks = np.zeros(-(-vocabulary_size // _BLOCK) * _BLOCK, np.float32)
        self._weights, self._blocks = whole_blocks[:vocabulary_size], whole_blocks.reshape(-1, _BLOCK)
        self._ones = np.ones(max(vocabulary_size, _BLOCK), np.float32)
        self._is_likely = np.empty(vocabulary_size, bool)

    def find(self, logits: Row, temperature: float, top_p: float) -> NDArray[np.intp]:
        """The nucleus of a row, (vocabulary,) -> ids, likeliest first; at temperature 0 the likeliest alone."""
        if temperature <= 0:
            return np.array([logits.argmax()])
        weights = self._weigh(logits, temperature)
        mass = top_p * weights.dot(self._ones[: weights.size])  # half the time of a sum
        for least in (1e-4, 0.0):  # sort as few as possible: those above mostly hold the mass
            ids = np.greater_equal(weights, np.float32(least), out=self._is_likely).nonzero()[0]
            chosen = weights[ids]
            if chosen.sum() >= mass:
                break
        order = (-chosen).argsort(kind="stable")
        count = int(chosen[order].cumsum().searchsorted(mass)) + 1
        return ids[order[:count]]

    def draw(self, logits: Row, temperature: float, chance: float) -> int:
        """Draw one of all tokens of a row, (vocabulary,), by a number that is uniform in [0, 1)."""
        self._weigh(logits, temperature)
        before = (self._blocks @ self._ones[:_BLOCK]).cumsum(dtype=np.float64)  # first which block, then where in it
        wanted = chance * before[-1]
        block = int(before.searchsorted(wanted, side="right"))
        within = self._blocks[block].cumsum(dtype=np.float64)
        rest = wanted - (before[block - 1] if block else 0.0)
        # The sums of a block differ by rounding: its end is its last token that can be drawn at all.
        place = min(int(within.searchsorted(rest, side="right")), int(within.searchsorted(within[-1])))
        return block * _BLOCK + place

    def _weigh(self, logits: Row, temperature: float) -> Row:
        """exp(logits / temperature) over that of the likeliest, in the working memory."""
        weights = np.subtract(logits, np.maximum.reduce(logits), out=self._weights)
        if temperature != 1:
            weights *= np.float32(1 / temperature)
        return np.exp(weights, out=weights)
