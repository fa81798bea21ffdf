"""One sampler chain of llama.cpp per request, in the order that `sampling.py` lays down."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp as C

from .base import GenerationRequest
from .llamacpp_vocabulary import LlamaVocabulary
from .sampling import seed32

_DRY_BREAKERS = ("\n", ":", '"', "*")  # koboldcpp's: a repetition does not run on across these


class LlamaSampler:
    """Draws the tokens of one reply, in C."""

    __slots__ = ("_chain",)

    def __init__(self, vocabulary: LlamaVocabulary, request: GenerationRequest) -> None:
        self._chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        sampling, seed = request.sampling, seed32(request.sampling.seed)
        biases = dict(sampling.logit_bias)
        if request.ignore_eos:
            biases.update(dict.fromkeys(vocabulary.end_ids, float("-inf")))
        if biases:
            array = (C.llama_logit_bias * len(biases))(*((token, bias) for token, bias in biases.items()))
            self._add(C.llama_sampler_init_logit_bias(vocabulary.size, len(biases), array))
        last_n = sampling.penalty_last_n
        if sampling.repetition_penalty != 1 and last_n:
            factor = C.llama_sampler_init_penalties(vocabulary.size, last_n, sampling.repetition_penalty, 0.0, 0.0)
            self._add(factor, request.prompt_ids[-last_n:])
        if (sampling.presence_penalty or sampling.frequency_penalty) and last_n:
            frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
            self._add(C.llama_sampler_init_penalties(vocabulary.size, last_n, 1.0, frequency, presence))
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
            self._add(dry, request.prompt_ids[-sampling.dry_penalty_last_n :])
        if sampling.temperature <= 0:
            self._add(C.llama_sampler_init_greedy())
            return
        if sampling.temperature != 1:
            self._add(C.llama_sampler_init_temp(sampling.temperature))
        if sampling.top_k > 0:
            self._add(C.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical_p < 1:
            self._add(C.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p < 1:
            self._add(C.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            self._add(C.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.xtc_probability > 0:
            self._add(C.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 1, seed))
        self._add(C.llama_sampler_init_dist(seed))

    def sample(self, context: C.llama_context_p, place: int) -> int:
        """Draw from the logits of one place in the batch, and remember the token."""
        return C.llama_sampler_sample(self._chain, context, place)

    def accept(self, token_id: int) -> None:
        """Remember a token that was not drawn."""
        C.llama_sampler_accept(self._chain, token_id)

    def close(self) -> None:
        """Free the chain. Nothing may be called after it."""
        C.llama_sampler_free(self._chain)

    def _add(self, sampler: C.llama_sampler_p, past_ids: Sequence[int] = ()) -> None:
        for token_id in past_ids:
            C.llama_sampler_accept(sampler, token_id)
        C.llama_sampler_chain_add(self._chain, sampler)
