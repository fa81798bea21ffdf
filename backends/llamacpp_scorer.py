"""Reading with a GGUF model: logits and hidden states of whole texts, as llama-perplexity gets them."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# llama-cpp-python's stubs make every handle optional and every integer a C type.

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as C
import numpy as np

from ..r1.errors import UserError
from . import machine
from .base import BackendFailed, LoadOptions
from .llamacpp_batch import Batch
from .llamacpp_load import last_words, load_model, silence
from .llamacpp_vocabulary import LlamaVocabulary
from .scorer import Floats, slab_rows


class LlamaScorer:
    """A GGUF model in memory, with a KV cache for one text of at most `context` tokens."""

    runtime = "llama.cpp"

    def __init__(self, paths: tuple[Path, ...], options: LoadOptions, *, context: int, watch: Any = None) -> None:
        silence()
        self._model = load_model(paths, options)
        vocabulary = LlamaVocabulary(self._model)
        self.vocabulary_size, self.bos_id, self.encode = vocabulary.size, vocabulary.bos_id, vocabulary.encode
        self._slab = slab_rows(vocabulary.size)
        self._width = C.llama_model_n_embd(self._model)
        params = C.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = 512
        params.n_outputs_max = self._slab
        params.n_threads = params.n_threads_batch = options.threads or machine.compute_threads()
        params.pooling_type = C.LLAMA_POOLING_TYPE_NONE
        self._watch = watch  # C calls it: it must live as long as the context
        if watch is not None:
            params.cb_eval = watch
        self._context = C.llama_init_from_model(self._model, params)
        if not self._context:
            C.llama_model_free(self._model)
            raise UserError(f"llama.cpp cannot make a context of {context} tokens: {last_words()}", "try a smaller one")
        self._batch = Batch(512)

    def logits(self, ids: Sequence[int], first: int) -> Iterator[Floats]:
        """What follows each of the positions from `first` on, in slabs (rows, V)."""
        for rows in self._decode(ids, first):
            address = C.llama_get_logits(self._context)
            yield np.ctypeslib.as_array(address, (rows, self.vocabulary_size)).copy()

    def states(self, ids: Sequence[int], first: int) -> Floats:
        """The last hidden states behind the final norm, from position `first` on: (T - first, D)."""
        C.llama_set_embeddings(self._context, True)
        try:
            slabs = []
            for rows in self._decode(ids, first):
                address = C.llama_get_embeddings(self._context)
                slabs.append(np.ctypeslib.as_array(address, (rows, self._width)).copy())
            return np.concatenate(slabs)
        finally:
            C.llama_set_embeddings(self._context, False)

    def close(self) -> None:
        """Free the context and the model."""
        C.llama_free(self._context)
        C.llama_model_free(self._model)

    def _decode(self, ids: Sequence[int], first: int) -> Iterator[int]:
        """Read a text; after each run of positions that were asked for, how many they are."""
        C.llama_memory_clear(C.llama_get_memory(self._context), True)
        cuts = [*range(0, first, self._batch.size), *range(first, len(ids), self._slab), len(ids)]
        for start, stop in itertools.pairwise(cuts):
            self._batch.fill(ids[start:stop], position=start, wanted=start >= first)
            status = C.llama_decode(self._context, self._batch.struct)
            if status:
                raise BackendFailed(f"llama_decode failed with status {status}: {last_words()}")
            if start >= first:
                yield stop - start
