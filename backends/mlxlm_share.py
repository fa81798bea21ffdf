"""One rank's share of a checkpoint: every layer divided by its heads (tensor), or some of the layers (pipeline).

All ranks call their shares with the same tokens. Rank 0 has the last layers and the head, and so the logits; what the
others return is of no use to anybody. Weights that a rank has no use for are never read. Knows nothing of requests.
"""

# pyright: reportMissingModuleSource=false

from __future__ import annotations

import os
from typing import Any

from mlx.utils import tree_flatten

from ..r1.errors import UserError
from . import mlxlm_load
from .base import LoadOptions
from .checkpoint import Checkpoint
from .cluster_split import Strategy
from .memory import Fit
from .mlxlm_load import create_attention_mask, mx

Group = Any  # mx.distributed.Group


class Whole:
    """All layers, whole, or each divided by its heads."""

    def __init__(self, model: Any, *, speaks: bool) -> None:
        self.layers = model.layers
        self.parts = [model if speaks else model.model]  # what of the model is needed here
        self._read = self.parts[0]

    def __call__(self, ids: mx.array, cache: list[Any]) -> mx.array:
        """Logits, (B, T, V), or where nobody asks for them what they are made of."""
        return self._read(ids, cache)


class Stage:
    """Some of the layers: takes what the next rank's made, and hands on to the one before. Rank 0's are the last."""

    def __init__(self, model: Any, rank: int, size: int, group: Group) -> None:
        self._model, self._rank, self._group = model, rank, group
        self._is_first = rank == size - 1
        every, more = divmod(len(model.layers), size)
        counts = [every + (number < more) for number in range(size)]
        start = sum(counts[rank + 1 :])
        self.layers = model.layers[start : start + counts[rank]]
        self.parts = [*self.layers, *([model.model.embed_tokens] if self._is_first else [])]
        if rank == 0:
            tied = model.args.tie_word_embeddings
            self.parts += [model.model.norm, model.model.embed_tokens if tied else model.lm_head]

    def __call__(self, ids: mx.array, cache: list[Any]) -> mx.array:
        """Logits, (B, T, V), on rank 0."""
        inner = self._model.model
        hidden = inner.embed_tokens(ids)  # (B, T, D); elsewhere than in the first only its shape is used
        mask = create_attention_mask(hidden, cache[0])
        if not self._is_first:
            hidden = mx.distributed.recv_like(hidden, self._rank + 1, group=self._group)
        for layer, state in zip(self.layers, cache, strict=True):
            hidden = layer(hidden, mask, state)
        if self._rank:
            hidden = mx.distributed.send(hidden, self._rank - 1, group=self._group)
            # Who only asks for keys and values has them sent, too.
            cache[-1].keys = mx.depends(cache[-1].keys, hidden)
            return hidden
        head = inner.embed_tokens.as_linear if self._model.args.tie_word_embeddings else self._model.lm_head
        return head(inner.norm(hidden))


def join_group(rank: int, size: int) -> Group | None:
    """Find the other ranks, as the environment tells (`MLX_HOSTFILE`, or JACCL's); `None` for one alone.

    May wait for ever, and no thread of this process runs meanwhile.
    """
    if size == 1:
        return None
    backend = "jaccl" if "MLX_JACCL_COORDINATOR" in os.environ else "ring"
    group = mx.distributed.init(strict=True, backend=backend)
    if (group.rank(), group.size()) != (rank, size):
        raise UserError(f"this is rank {group.rank()} of {group.size()}, and was to be {rank} of {size}", None)
    meet(group)
    return group


def load_share(
    checkpoint: Checkpoint, options: LoadOptions, strategy: Strategy, rank: int, size: int, group: Group | None
) -> tuple[Whole | Stage, Fit]:
    """The share of one rank, in memory, with the context and the cache that there is room for here."""
    mlxlm_load.choose_device(options)
    model = mlxlm_load.read_lazily(checkpoint, options)
    if strategy == "pipeline":
        share: Whole | Stage = Stage(model, rank, size, group)
    else:
        if strategy == "tensor":
            model.shard(group)
        share = Whole(model, speaks=rank == 0)
    needed: list[Any] = [weights for part in share.parts for _, weights in tree_flatten(part.parameters())]
    kv_share = len(share.layers) / len(model.layers) / (size if strategy == "tensor" else 1)
    fitted = mlxlm_load.fit(
        checkpoint, options, weights_bytes=sum(weights.nbytes for weights in needed), kv_share=kv_share
    )
    mx.eval(needed)
    meet(group)
    return share, fitted


def meet(group: Group | None) -> None:
    """Wait for the other ranks. Raises what MLX raises where one is gone."""
    if group is not None:
        mx.eval(mx.distributed.all_sum(mx.ones(1), group=group, stream=mx.cpu))
