"""Keys and values of replies in MLX's arrays: one reply alone, or several side by side.

A reply's *state* is mlx-lm's `KVCache`, one a layer. To read a prompt, a reply has a state of its own; to be taken one
token further with others it joins the *rows*, whose `BatchKVCache` pads every reply on the left to the longest. Any
state can be cut to a prefix, so nothing has to be set aside for the prompt of a later turn. Knows nothing of requests.
"""

# pyright: reportMissingModuleSource=false

from __future__ import annotations

from array import array
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

State = list[Any]  # one cache a layer


class Kept:
    """A state with a size, as `PrefixStore` wants it."""

    __slots__ = ("size", "state")

    def __init__(self, state: State, size: int) -> None:
        self.state = state
        self.size = size  # tokens

    def __len__(self) -> int:
        return self.size


class HasState(Protocol):
    """A reply whose decoded tokens lie in a state of its own, or in a row (then its state is `None`)."""

    tokens: array[int]
    state: State | None


Reply = TypeVar("Reply", bound=HasState)


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


class Rows(Generic[Reply]):
    """The replies that every step takes one token further, together."""

    def __init__(self) -> None:
        self.members: list[Reply] = []
        self.state: State = []  # of one member: its own; of more: batch caches

    def join(self, replies: list[Reply]) -> None:
        """Take replies in, with their states."""
        if not replies:
            return
        states = [reply.state for reply in replies if reply.state is not None]
        if len(self.members) == 1:
            states.insert(0, self.state)
        layers = [list(layer) for layer in zip(*states, strict=True)]
        if len(self.members) > 1:
            for rows, others in zip(self.state, layers, strict=True):
                rows.extend(BatchKVCache.merge(others))
        else:
            self.state = states[0] if len(states) == 1 else [BatchKVCache.merge(layer) for layer in layers]
        for reply in replies:
            reply.state = None
        self.members += replies

    def leave(self, replies: list[Reply], *, keep: bool = False) -> None:
        """Let replies go; to keep a state gives it back to its reply."""
        leaving = [reply for reply in replies if reply in self.members]
        if not leaving:
            return
        if keep:
            for reply in leaving:
                reply.state = self.state if len(self.members) == 1 else self._extract(self.members.index(reply))
        staying = [i for i, reply in enumerate(self.members) if reply not in leaving]
        if len(self.members) > 1 and staying:
            if len(staying) == 1:
                self.state = self._extract(staying[0])
            else:
                for layer in self.state:
                    layer.filter(staying)
        self.members = [self.members[i] for i in staying]
        if not staying:
            self.state = []

    def prefix(self, reply: Reply, length: int) -> State:
        """A copy of the first tokens of one member."""
        return cut(self.state if len(self.members) == 1 else self._extract(self.members.index(reply)), length)

    def clear(self) -> None:
        """Forget everybody."""
        self.members, self.state = [], []

    def _extract(self, row: int) -> State:
        state = [layer.extract(row) for layer in self.state]
        mx.eval([(layer.keys, layer.values) for layer in state])
        return state
