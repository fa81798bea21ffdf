"""Keys and values of sequences in MLX's arrays: one alone, or several side by side.

A *state* is mlx-lm's `KVCache`, one a layer. To read a prompt it lies alone; to be taken one token further with others
it joins the *rows*, whose `BatchKVCache` pads every sequence on the left to the longest. Any state can be cut to a
prefix, so nothing has to be set aside for the prompt of a later turn. Knows nothing of models and requests.
"""

# pyright: reportMissingModuleSource=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .mlxlm_load import BatchKVCache, KVCache, mx

State = list[Any]  # one cache a layer


def cut(state: State, length: int) -> State:
    """A copy of the first `length` tokens, without the room that mlx-lm leaves behind the last one."""
    copies: State = []
    for layer in state:
        copy = KVCache()
        copy.keys = mx.contiguous(layer.keys[..., :length, :])
        copy.values = mx.contiguous(layer.values[..., :length, :])
        copy.offset = length
        copies.append(copy)
    # What is not computed yet would hold on to the whole of what it is cut from.
    mx.eval([(copy.keys, copy.values) for copy in copies])
    return copies


class States:
    """All states by their handles: those that lie alone, and the rows."""

    def __init__(self) -> None:
        self.alone: dict[int, State] = {}
        self.rows: list[int] = []
        self.together: State = []  # the rows': of one row its own state, of more batch caches

    def copy(self, handle: int, source: int, length: int) -> None:
        """The first tokens of another state."""
        self.alone[handle] = cut(self.alone[source] if source in self.alone else self._row(source), length)

    def join(self, handles: Sequence[int]) -> None:
        """Put states into the rows."""
        if not handles:
            return
        states = [self.alone.pop(handle) for handle in handles]
        if len(self.rows) == 1:
            states.insert(0, self.together)
        layers = [list(layer) for layer in zip(*states, strict=True)]
        if len(self.rows) > 1:
            for rows, others in zip(self.together, layers, strict=True):
                rows.extend(BatchKVCache.merge(others))
        else:
            self.together = states[0] if len(states) == 1 else [BatchKVCache.merge(layer) for layer in layers]
        self.rows += handles

    def part(self, handles: Sequence[int]) -> None:
        """Take states out of the rows, to lie alone."""
        states = {handle: self._row(handle) for handle in handles}
        self._leave(handles)
        self.alone |= states

    def drop(self, handles: Sequence[int]) -> None:
        """Forget states."""
        self._leave([handle for handle in handles if self.alone.pop(handle, None) is None])

    def clear(self) -> None:
        """Forget everything."""
        self.alone, self.rows, self.together = {}, [], []

    def _leave(self, handles: Sequence[int]) -> None:
        if not handles:
            return
        staying = [place for place, handle in enumerate(self.rows) if handle not in handles]
        if len(self.rows) > 1 and staying:
            if len(staying) == 1:
                self.together = self._row(self.rows[staying[0]])
            else:
                for layer in self.together:
                    layer.filter(staying)
        self.rows = [self.rows[place] for place in staying]
        if not staying:
            self.together = []

    def _row(self, handle: int) -> State:
        row = self.rows.index(handle)
        if len(self.rows) == 1:
            return self.together
        state = [layer.extract(row) for layer in self.together]
        mx.eval([(layer.keys, layer.values) for layer in state])
        return state
