"""A decoding step as one CUDA graph: the launches of a thousand small kernels cost more than the kernels.

A graph has fixed shapes: one for each power of two of places and of cells to look at, captured when it is first
needed. Row i is place i; places that decode nothing write into a cell that nobody reads. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pytorch_decoder import Batch, Cache, Decoder, Rows

_LEAST_CELLS = 256


class Graphs:
    """The graphs of one decoder over one cache, whose last cell is for rows that decode nothing."""

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        self._decoder, self._cache = decoder, cache
        self._places, self._cells = cache.keys.shape[1], cache.keys.shape[3]
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # Ids and positions; one copy a step fills both.
        self._inputs = torch.zeros((2, self._places), dtype=torch.int64, device=decoder.device)
        self._staged = torch.zeros((2, self._places), dtype=torch.int64, pin_memory=True)
        self._pool = torch.cuda.graph_pool_handle()

    def decode(self, ids: Sequence[int], positions: Sequence[int], places: Sequence[int]) -> Tensor:
        """One token each for some places: logits (len(ids), vocabulary), valid until the next call."""
        count, cells = fixed_shape(max(places) + 1, max(positions) + 1, self._places, self._cells)
        self._staged[0].zero_()
        self._staged[1].fill_(self._cells - 1)
        index = torch.tensor(places)
        self._staged[0, index] = torch.tensor(ids)
        self._staged[1, index] = torch.tensor(positions)
        self._inputs.copy_(self._staged)
        if (count, cells) not in self._graphs:
            self._graphs[count, cells] = self._capture(count, cells)
        graph, logits = self._graphs[count, cells]
        graph.replay()
        return logits[index.to(logits.device)]

    def _capture(self, count: int, cells: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what allocates its workspace at the first call does it before the capture
            for _ in range(2):
                self._run(count, cells)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._run(count, cells)
        return graph, logits

    def _run(self, count: int, cells: int) -> Tensor:
        ids, positions = self._inputs[:, :count]
        return self._decoder(fixed_batch(ids, positions, cells), self._cache)


def fixed_shape(places: int, longest: int, most_places: int, most_cells: int) -> tuple[int, int]:
    """Rows and cells of the smallest graph that will do.

    >>> fixed_shape(3, 300, most_places=6, most_cells=4096), fixed_shape(5, 10, most_places=6, most_cells=4096)
    ((4, 512), (6, 256))
    """
    cells = max(_LEAST_CELLS, 1 << (longest - 1).bit_length())
    return min(most_places, 1 << (places - 1).bit_length()), min(most_cells, cells)


def fixed_batch(ids: Tensor, positions: Tensor, cells: int) -> Batch:
    """A batch of one token for each of the first places, whose mask is reckoned on the device: (R,), (R,)."""
    count = ids.shape[0]
    places = torch.arange(count, device=ids.device)
    mask = torch.arange(cells, device=ids.device) <= positions[:, None]
    return Batch(ids, positions, places, [Rows(0, count, cells, mask[:, None, None])], [], None)
