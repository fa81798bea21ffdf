"""What one `llama_decode` is given: whose tokens, and how many of them. Knows nothing of what they mean."""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# llama-cpp-python's stubs make every handle optional and every integer a C type.

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Protocol

import llama_cpp as C
import numpy as np

from .kvcache import CachedSequence


class Known(Protocol):
    """A reply with tokens that are known and not yet decoded."""

    sequence: CachedSequence | None
    todo: array[int]


class Batch:
    """The `llama_batch` of a step, in arrays that are filled by slices."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tokens = 0
        self.entries: list[tuple[Known, int]] = []  # whose tokens, and how many
        self.outputs: list[int] = []  # places in the batch whose logits are wanted
        self._ids = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        self._counts = np.ones(size, np.int32)
        first, step = self._sequences.ctypes.data, self._sequences.itemsize
        self._pointers = (ctypes.POINTER(C.llama_seq_id) * size)(
            *(ctypes.cast(first + i * step, ctypes.POINTER(C.llama_seq_id)) for i in range(size))
        )
        self.struct = C.llama_batch(
            n_tokens=0,
            token=self._ids.ctypes.data_as(ctypes.POINTER(C.llama_token)),
            embd=None,
            pos=self._positions.ctypes.data_as(ctypes.POINTER(C.llama_pos)),
            n_seq_id=self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._pointers,
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    @property
    def room(self) -> int:
        """Tokens that can still be added."""
        return self.size - self.tokens

    def clear(self) -> None:
        """Begin the next step."""
        self.tokens, self.entries, self.outputs = 0, [], []

    def add(self, reply: Known, count: int) -> None:
        """Take the first `count` known tokens of a reply; the logits of the last are wanted if no more are known."""
        assert reply.sequence is not None
        start, end, position = self.tokens, self.tokens + count, reply.sequence.length
        self._ids[start:end] = reply.todo[:count]
        self._positions[start:end] = range(position, position + count)
        self._sequences[start:end] = reply.sequence.id
        self._wanted[start:end] = 0
        if count == len(reply.todo):
            self._wanted[end - 1] = 1
            self.outputs.append(end - 1)
        self.entries.append((reply, count))
        self.tokens = self.struct.n_tokens = end

    def fill(self, ids: Sequence[int], *, position: int, wanted: bool) -> None:
        """Take a piece of one text, the first sequence's, and nothing else; the logits of all of it or of none."""
        self.clear()
        self._ids[: len(ids)] = ids
        self._positions[: len(ids)] = range(position, position + len(ids))
        self._sequences[: len(ids)] = 0
        self._wanted[: len(ids)] = wanted
        self.tokens = self.struct.n_tokens = len(ids)
