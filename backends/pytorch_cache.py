"""The PyTorch backend's KV cache: a place for every sequence that runs, and a store in RAM for those that ran.

A new prompt takes the lowest place that is idle, since neighbours are attended to together, and starts from the
longest prefix that any place or the store has; what has to go moves to the store. Knows nothing of requests.
"""

from __future__ import annotations

from array import array

from torch import Tensor

from . import machine
from .kvcache import CachedSequence, KVCache, common_prefix
from .prefixstore import PrefixStore
from .pytorch_decoder import Cache

_WORTH_RESTORING = 16  # tokens that the store has over the cache: copying back has its price
_WORTH_STORING = 0.8  # of a sequence; more of it stays where it is, and it is not stored
_MOST_STORED = 2 << 30  # bytes


class _Saved:
    """Keys and values of one sequence, in RAM: (layers, kv_heads, tokens, head) each."""

    __slots__ = ("keys", "values")

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def __len__(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class TorchCache:
    """The sequences of one cache."""

    def __init__(self, cache: Cache, context: int, *, stored_bytes: int | None = None) -> None:
        self.tensors = cache
        places = cache.keys.shape[1]
        self._cache = KVCache(places, places * context)
        most = min(_MOST_STORED, machine.free_memory() // 8)
        self._store = PrefixStore(most if stored_bytes is None else stored_bytes)

    @property
    def cells(self) -> int:
        """Tokens that fit, all sequences together."""
        return self._cache.cells

    @property
    def used(self) -> int:
        """Tokens in it."""
        return sum(sequence.length for sequence in self._cache)

    def found(self, prompt: array[int]) -> int:
        """How many tokens at the start of a prompt need not be read."""
        length = max(self._cache.longest_prefix(prompt)[1], self._store.longest_prefix(prompt)[1])
        return min(length, len(prompt) - 1)  # one token at least: its logits are wanted

    def begin(self, prompt: array[int]) -> CachedSequence | None:
        """A running sequence that starts with as much of a prompt as there is; `None` if no more can run."""
        place, resident = self._cache.lowest()
        if place is None:
            return None
        most = len(prompt) - 1
        here = min(common_prefix(resident.tokens, prompt), most) if resident else 0
        source, there = self._cache.longest_prefix(prompt)
        stored, kept = self._store.longest_prefix(prompt)
        there, kept = min(there, most), min(kept, most)
        restores = stored is not None and kept >= max(here, there) + _WORTH_RESTORING
        copies = not restores and source is not resident and there > here
        if resident is not None and here < _WORTH_STORING * resident.length:
            self._store.put(resident.tokens[:], lambda: self._save(resident))
        if resident is not None and not restores and not copies:
            self._cache.resume(resident, here)
            return resident
        if resident is not None:
            self._cache.drop(resident)
        sequence = self._cache.open_at(place)
        if restores and stored is not None:
            self._store.touch(stored)
            self._write(place, kept, stored.data.keys, stored.data.values)
            sequence.tokens.extend(stored.tokens[:kept])
        elif copies and source is not None:
            keys, values = (cells[:, source.id] for cells in self.tensors)
            self._write(place, there, keys, values)
            sequence.tokens.extend(source.tokens[:there])
        return sequence

    def end(self, sequence: CachedSequence) -> None:
        """Keep a sequence that no longer runs, for the next prompt that begins like it."""
        if sequence.length:
            self._cache.retain(sequence)
        else:
            self._cache.drop(sequence)

    def clear(self) -> None:
        """Forget what is in the cache: after a failed step it cannot be trusted."""
        self._cache.clear()

    def forget(self) -> None:
        """Forget every prefix, stored ones too: they were read with other weights."""
        for sequence in [sequence for sequence in self._cache if not sequence.running]:
            self._cache.drop(sequence)
        self._store.clear()

    def close(self) -> None:
        """Give the memory back. Only the books may be looked at after it."""
        del self.tensors
        self._store.clear()

    def _save(self, sequence: CachedSequence) -> _Saved:
        keys, values = (cells[:, sequence.id, :, : sequence.length].cpu() for cells in self.tensors)
        return _Saved(keys.clone(), values.clone())

    def _write(self, place: int, length: int, keys: Tensor, values: Tensor) -> None:
        for cells, source in zip(self.tensors, (keys, values), strict=True):
            cells[:, place, :, :length] = source[:, :, :length].to(cells.device)
