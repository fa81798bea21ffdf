"""A model of mlx-lm, or one rank's share of one, and the states that it reads into. Knows nothing of requests."""

# pyright: reportMissingModuleSource=false

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from .memory import Fit
from .mlxlm_cache import States
from .mlxlm_load import KVCache, mx


class LocalExecutor:
    """The model in this process."""

    name = "MLX"

    def __init__(self, model: Any, fitted: Fit) -> None:
        self.context_length = fitted.context
        self.cache_tokens = fitted.cache_tokens
        self._model = model
        self._states = States()

    def begin(self, state: int) -> None:
        """An empty state, alone."""
        self._states.alone[state] = [KVCache() for _ in self._model.layers]

    def copy(self, state: int, source: int, length: int) -> None:
        """The first `length` tokens of another state."""
        self._states.copy(state, source, length)

    def drop(self, states: Sequence[int]) -> None:
        """Forget states."""
        self._states.drop(states)

    def join(self, states: Sequence[int]) -> None:
        """Put states into the rows."""
        self._states.join(states)

    def part(self, states: Sequence[int]) -> None:
        """Take states out of the rows."""
        self._states.part(states)

    def read(self, state: int, token_ids: Sequence[int]) -> None:
        """Read tokens into a state that lies alone."""
        layers = self._states.alone[state]
        self._model(mx.array([list(token_ids)]), cache=layers)
        mx.eval([(layer.keys, layer.values) for layer in layers])  # the logits are not, and so never computed
        mx.clear_cache()

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one token into each row; logits of what follows."""
        ids = mx.array([[token_id] for token_id in token_ids])  # (B, 1)
        logits = self._model(ids, cache=self._states.together)[:, -1].astype(mx.float32)  # (B, V)
        mx.eval(logits)
        return np.array(logits)

    def memory_bytes(self) -> int:
        """What MLX has in use: weights and states."""
        return mx.get_active_memory()

    def clear(self) -> None:
        """Forget all states."""
        self._states.clear()
        mx.clear_cache()

    def close(self) -> None:
        """Give the memory back."""
        self._states.clear()
        del self._model
        mx.synchronize()
        mx.clear_cache()
        if threading.current_thread() is not threading.main_thread():
            mx.clear_streams()  # those of a thread that has ended would abort the process at its end
