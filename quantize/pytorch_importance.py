"""The importance matrix of a checkpoint, collected from its inputs layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .importance import Importance, Sums
from .kld import Ids
from .pytorch_layers import Decoder, batches


def collect(
    decoder: Decoder, chunks: Ids, datasets: tuple[str, ...], progress: Callable[[int], None] | None = None
) -> Importance:
    """Have the model read texts (N, T), and sum the squares of what goes into each of its layers' matrices."""
    sums = Sums()
    hidden = decoder.embed(chunks)
    with torch.inference_mode():
        for number in range(decoder.count):
            with decoder.layer(number) as layer:
                hooks = [m.register_forward_pre_hook(watch(sums, name)) for name, m in layer.linears.items()]
                for some in batches(hidden):
                    hidden[some] = decoder.run(layer, hidden[some])
                for hook in hooks:
                    hook.remove()
            if progress:
                progress(1)
    return sums.importance(datasets, *chunks.shape)


def watch(sums: Sums, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds up what goes into a matrix."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
        sums.add(name, (x * x).sum(0).numpy(), len(x))

    return add
