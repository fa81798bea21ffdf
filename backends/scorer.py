"""The contract of a model that is only read with: a text's token ids in, what it expects at every position out.

`Backend` writes replies and gives drawn tokens; measuring needs the whole distribution. Plain data and a protocol: no
runtime is imported. Shapes: T tokens of one text, V tokens in the vocabulary, D the width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SLAB_BYTES = 64 << 20  # logits of so many bytes are held at once: 110 positions of R1's vocabulary


class Scorer(Protocol):
    """A loaded model that reads. Not thread-safe; every text starts from an empty cache."""

    runtime: str  # "llama.cpp"
    vocabulary_size: int  # V
    bos_id: int | None  # where the model wants its texts to begin with one

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in which control tokens count as such; nothing is put in front."""
        ...

    def logits(self, ids: Sequence[int], first: int) -> Iterator[Floats]:
        """What follows each of the positions from `first` on, in order, in slabs (rows, V) that are the caller's."""
        ...

    def states(self, ids: Sequence[int], first: int) -> Floats:
        """The last hidden states behind the final norm, from position `first` on: (T - first, D).

        Times the output matrix they are the logits.
        """
        ...

    def close(self) -> None:
        """Give everything back. Nothing may be called after it."""
        ...


def slab_rows(vocabulary_size: int) -> int:
    """How many positions' logits are held at once."""
    return max(16, min(512, SLAB_BYTES // (4 * vocabulary_size)))
