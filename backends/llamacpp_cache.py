"""llama.cpp's KV cache, with what `kvcache.py` knows of it and a store in RAM behind it.

Where memory allows, every place in the batch has cells of its own (*partitioned*): a token looks at its own sequence
only. A prefix that lies in another place is copied, through RAM. So is a running sequence, into a place below it that
has become idle: llama.cpp decodes neighbours together.

Otherwise all share one pool (*pooled*): prefixes are shared for nothing and a long reply can borrow, but each new token
looks at every cell in use, its own or not; on a CPU idle conversations can cost more than the model. So only as many
cells are left to sequences that nobody runs as cost little beside the weights.

Either way what has to go moves to RAM and comes back when a prompt begins with it. Knows nothing of requests.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# llama-cpp-python's stubs make every handle optional and every integer a C type.

from __future__ import annotations

import ctypes
from array import array

import llama_cpp as C
import numpy as np
from numpy.typing import NDArray

from . import machine
from .kvcache import CachedSequence, KVCache, common_prefix
from .prefixstore import PrefixStore

_BYTES = ctypes.POINTER(ctypes.c_uint8)
_WORTH_RESTORING = 16  # tokens that the store has over the cache: copying back has its price
_WORTH_STORING = 0.8  # of a sequence; more of it in another one, and it is not stored
_DEAREST_COPY = 32  # a whole sequence is copied for a prefix; not if it is so many times as long
_MOST_STORED = 2 << 30  # bytes
_BYTES_PER_HEAD_CELL = 2000  # weights to read for each head and cell looked at: a few percent of a step


class LlamaCache:
    """The sequences of one context."""

    def __init__(
        self,
        context: C.llama_context_p,
        model: C.llama_model_p,
        sequences: int,
        cells: int,
        *,
        partitioned: bool,
        stored_bytes: int | None = None,
    ) -> None:
        self._context = context
        self._partitioned = partitioned
        self._memory = C.llama_get_memory(context)
        self._cache = KVCache(sequences, cells)
        most = min(_MOST_STORED, machine.free_memory() // 8)
        self._store = PrefixStore(most if stored_bytes is None else stored_bytes)
        # The state of recurrent layers cannot be cut back to a prefix.
        self.reuses = not (C.llama_model_is_recurrent(model) or C.llama_model_is_hybrid(model))
        self._dearest_move = C.llama_model_size(model) // 4  # bytes: copied out and in, half of what a step reads
        heads = C.llama_model_n_layer(model) * C.llama_model_n_head(model)
        self._idle_cells = max(128, C.llama_model_size(model) // (max(1, heads) * _BYTES_PER_HEAD_CELL))

    @property
    def cells(self) -> int:
        """Tokens that fit, all sequences together."""
        return self._cache.cells

    @property
    def used(self) -> int:
        """Tokens in it; shared ones count once."""
        return self._cache.used

    def found(self, prompt: array[int]) -> int:
        """How many tokens at the start of a prompt need not be decoded."""
        if not self.reuses:
            return 0
        length = max(self._cache.longest_prefix(prompt)[1], self._store.longest_prefix(prompt)[1])
        return min(length, len(prompt) - 1)  # one token at least: its logits are wanted

    def begin(self, prompt: array[int]) -> CachedSequence | None:
        """A running sequence that starts with as much of a prompt as there is; `None` if no more can run."""
        if self._partitioned:
            return self._begin_at_home(prompt)
        source, length = self._cache.longest_prefix(prompt) if self.reuses else (None, 0)
        length = min(length, len(prompt) - 1)
        stored, more = self._store.longest_prefix(prompt) if self.reuses else (None, 0)
        more = min(more, len(prompt) - 1)
        restore = stored is not None and more >= length + _WORTH_RESTORING
        if restore:
            source, length = None, 0
        sequence = self._cache.open(source, length)
        if sequence is None and self.make_room(but=source):
            sequence = self._cache.open(source, length)
        if sequence is None:
            return None
        if restore and stored is not None:
            self._store.touch(stored)
            self._restore(sequence, stored.tokens, stored.data, more)
        elif source and length:
            C.llama_memory_seq_cp(self._memory, source.id, sequence.id, 0, length)
        self._tidy()
        return sequence

    def _begin_at_home(self, prompt: array[int]) -> CachedSequence | None:
        """As `begin`, in the lowest place that is idle: llama.cpp decodes neighbours together, others one by one."""
        place, resident = self._cache.lowest()
        if place is None:
            return None
        if not self.reuses:
            return self._cache.open_at(place)
        most = len(prompt) - 1
        here = min(common_prefix(resident.tokens, prompt), most) if resident else 0
        source, there = self._cache.longest_prefix(prompt)
        stored, kept = self._store.longest_prefix(prompt)
        there, kept = min(there, most), min(kept, most)
        tokens, data, length = array("i"), None, here
        if stored and kept >= length + _WORTH_RESTORING and kept * _DEAREST_COPY >= len(stored.tokens):
            self._store.touch(stored)
            tokens, data, length = stored.tokens, stored.data, kept
        if source and source is not resident and there > length and there * _DEAREST_COPY >= source.length:
            tokens, data, length = source.tokens[:], self._save(source), there
        if resident is not None and here < _WORTH_STORING * resident.length:
            self._stash(resident)
        if data is None and resident is not None:
            C.llama_memory_seq_rm(self._memory, place, here, -1)
            self._cache.resume(resident, here)
            return resident
        if resident is not None:
            self.discard(resident)
        sequence = self._cache.open_at(place)
        if data is not None:
            self._restore(sequence, tokens, data, length)
        return sequence

    def close_gaps(self) -> None:
        """Move the running sequences that are behind an idle place into it, where a copy costs less than a step.

        llama.cpp decodes a run of neighbours together: all weights are read once more for every gap among them.
        """
        while self._partitioned and self.reuses:
            place, resident = self._cache.lowest()
            last = self._cache.highest()
            if place is None or last is None or last.id < place:
                return
            if C.llama_state_seq_get_size(self._context, last.id) > self._dearest_move:
                return
            data = self._save(last)
            if resident is not None:
                self._stash(resident)
                self.discard(resident)
            if not self._load(data, place):
                return
            self._remove(last)
            self._cache.move(last, place)

    def end(self, sequence: CachedSequence, *, others_run: bool) -> None:
        """Keep a sequence that no longer runs, for the next prompt that begins like it."""
        if not (self.reuses and sequence.length):
            self.discard(sequence)
            return
        for covered in self._cache.retain(sequence):
            self._remove(covered)
        if others_run and not self._partitioned:
            self._tidy()

    def discard(self, sequence: CachedSequence) -> None:
        """Drop a sequence and what is in it."""
        self._remove(sequence)
        self._cache.drop(sequence)

    def make_room(self, but: CachedSequence | None = None) -> bool:
        """Move the idle sequence that was used least recently to RAM; false if there is none (but for one)."""
        evicted = self._cache.evict(but=but)
        if evicted is None:
            return False
        shared = max((common_prefix(other.tokens, evicted.tokens) for other in self._cache), default=0)
        if shared < _WORTH_STORING * evicted.length:
            self._store.put(evicted.tokens, lambda: self._save(evicted))
        self._remove(evicted)
        return True

    def clear(self) -> None:
        """Forget everything: after a failed decode, or with other weights, the cache cannot be trusted."""
        self._cache.clear()
        self._store.clear()
        C.llama_memory_clear(self._memory, True)

    def _tidy(self) -> None:
        while self._cache.idle > self._idle_cells and self.make_room():
            pass

    def _save(self, sequence: CachedSequence) -> NDArray[np.uint8]:
        size = C.llama_state_seq_get_size(self._context, sequence.id)
        data = np.empty(size, np.uint8)
        written = C.llama_state_seq_get_data(self._context, data.ctypes.data_as(_BYTES), size, sequence.id)
        return data if written == size else data[:0]

    def _stash(self, sequence: CachedSequence) -> None:
        self._store.put(sequence.tokens[:], lambda: self._save(sequence))

    def _restore(self, sequence: CachedSequence, tokens: array[int], data: NDArray[np.uint8], length: int) -> None:
        """Copy a stored sequence back. Where it does not fit, the sequence stays empty and is decoded."""
        if self._load(data, sequence.id):
            C.llama_memory_seq_rm(self._memory, sequence.id, length, -1)
            sequence.tokens.extend(tokens[:length])

    def _load(self, data: NDArray[np.uint8], place: int) -> bool:
        """Put a saved sequence into a place that is empty; false, with the place still empty, where it does not fit."""
        if len(data) and C.llama_state_seq_set_data(self._context, data.ctypes.data_as(_BYTES), len(data), place):
            return True
        C.llama_memory_seq_rm(self._memory, place, -1, -1)
        return False

    def _remove(self, sequence: CachedSequence) -> None:
        C.llama_memory_seq_rm(self._memory, sequence.id, -1, -1)
