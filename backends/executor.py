"""What the scheduler of `mlxlm.py` has done for it, in plain data: states by handles, token ids, logits in numpy.

A *state* is what a model has read of one sequence. It lies alone, or as one of the *rows* that a step takes one token
further together. Whoever executes decides nothing: the same calls in the same order give the same states, in this
process (`mlxlm_executor.py`) or in the ranks of a cluster (`cluster_ranks.py`). Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Executor(Protocol):
    """A model and its states. Not thread-safe. Any call may raise; then no state can be trusted until `clear`."""

    name: str  # as it is said of failures: "MLX"
    context_length: int  # tokens that a state may have
    cache_tokens: int  # tokens that all states together may have

    def begin(self, state: int) -> None:
        """An empty state, alone."""
        ...

    def copy(self, state: int, source: int, length: int) -> None:
        """The first `length` tokens of another state, wherever that lies, as a state alone."""
        ...

    def drop(self, states: Sequence[int]) -> None:
        """Forget states, wherever they lie."""
        ...

    def join(self, states: Sequence[int]) -> None:
        """Put states that lie alone into the rows, behind those that are there."""
        ...

    def part(self, states: Sequence[int]) -> None:
        """Take states out of the rows, to lie alone; the others keep their order."""
        ...

    def read(self, state: int, token_ids: Sequence[int]) -> None:
        """Read tokens into a state that lies alone; returns when it is done."""
        ...

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one token into each row, in order; float32 logits of what follows, (rows, vocabulary)."""
        ...

    def clear(self) -> None:
        """Forget all states."""
        ...

    def close(self) -> None:
        """Give the memory back. Nothing may be called after it."""
        ...
