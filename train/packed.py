"""Frozen matrices that stay in the bytes of a GGUF file: made into numbers where they are used, and dropped.

On a CPU ggml makes the numbers, elsewhere PyTorch does, the same to the bit: every product in a block is exact in 32
bits, so that it does not matter who rounds when. Knows nothing of files and adapters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backends import ggml
from ..r1.gguf import TENSOR_TYPES

_BLOCKS = {name: (weights, size) for name, weights, size in TENSOR_TYPES.values()}  # of a block; size in bytes
_IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)


class Room(threading.local):
    """A thread's memory on a CPU for one matrix at a time, used again and again: many would leave the heap in holes."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0)

    def take(self, count: int) -> Tensor:
        """So many float32; what was there before is overwritten."""
        if self._numbers.numel() < count:
            self._numbers = torch.empty(count)
        return self._numbers[:count]


class Matrix(nn.Module):
    """Rows of one of ggml's types, as bytes. `Linear` and `Embedding` may share one."""

    blocks: Tensor  # (R, bytes of a row)

    def __init__(self, blocks: Tensor, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("blocks", blocks, persistent=False)
        self.kind = kind  # "Q4_K"
        self.dtype = dtype  # of the numbers

    def rows(self, which: Tensor | slice = slice(None), room: Room | None = None) -> Tensor:
        """Some of the rows, or all, as numbers: (R, C), made anew."""
        return unpack(self.blocks[which], self.kind, room).to(self.dtype)


class Linear(nn.Module):
    """As `nn.Linear`, but that every look at `weight` makes the matrix anew."""

    def __init__(self, matrix: Matrix, like: nn.Linear) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = like.bias
        self.in_features, self.out_features = like.in_features, like.out_features

    @property
    def weight(self) -> Tensor:
        """(out, in)."""
        return self.matrix.rows()

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """x W' + bias."""
        return functional.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """As `nn.Embedding`; only the rows that are asked for are made."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    @property
    def dtype(self) -> torch.dtype:
        """Of what comes out."""
        return self.matrix.dtype

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., width)
        """A row for every id."""
        return self.matrix.rows(ids.flatten()).view(*ids.shape, -1)


_ROOM = Room()


def rows_of(layer: nn.Linear | Linear, which: Tensor | slice = slice(None)) -> Tensor:
    """Rows of a linear layer's matrix, all or some, for one product: the next call overwrites what was packed."""
    return layer.matrix.rows(which, _ROOM) if isinstance(layer, Linear) else layer.weight[which]


def unpack(rows: Tensor, kind: str, room: Room | None = None) -> Tensor:
    """Rows of one of `KINDS` as numbers: (R, bytes of a row), uint8 -> (R, C), float32."""
    if rows.device.type != "cpu":
        return by_torch(rows, kind)
    weights, size = _BLOCKS[kind]
    cols = rows.shape[-1] // size * weights
    out = room.take(len(rows) * cols).view(-1, cols).numpy() if room else None
    return torch.from_numpy(ggml.dequantize(kind, rows.numpy(), cols, out))


def by_torch(rows: Tensor, kind: str) -> Tensor:
    """The same on any device."""
    return KINDS[kind](rows.unflatten(-1, (-1, _BLOCKS[kind][1]))).flatten(-2)


# One function a type: (..., bytes of a block) -> (..., its weights)


def _f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def _q8_0(blocks: Tensor) -> Tensor:
    scale, q = _cut(blocks, 2, 32)
    return q.view(torch.int8).float().mul_(_number(scale))


def _q4_0(blocks: Tensor) -> Tensor:
    scale, q = _cut(blocks, 2, 16)
    return _fields(q, 4).flatten(-2).float().sub_(8).mul_(_number(scale))


def _q4_1(blocks: Tensor) -> Tensor:
    scale, least, q = _cut(blocks, 2, 2, 16)
    return _fields(q, 4).flatten(-2).float().mul_(_number(scale)).add_(_number(least))


def _q5_0(blocks: Tensor) -> Tensor:
    scale, high, q = _cut(blocks, 2, 4, 16)
    return _five_bits(q, high).float().sub_(16).mul_(_number(scale))


def _q5_1(blocks: Tensor) -> Tensor:
    scale, least, high, q = _cut(blocks, 2, 2, 4, 16)
    return _five_bits(q, high).float().mul_(_number(scale)).add_(_number(least))


def _five_bits(q: Tensor, high: Tensor) -> Tensor:
    return _fields(q, 4).flatten(-2) | (_in_order(high, 1) << 4)


def _q4_k(blocks: Tensor) -> Tensor:
    scale, least, scales, q = _cut(blocks, 2, 2, 12, 128)
    return _with_scales(_fields(q.unflatten(-1, (4, 32)), 4).flatten(-3, -2), scale, least, scales)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, least, scales, high, q = _cut(blocks, 2, 2, 12, 32, 128)
    low = _fields(q.unflatten(-1, (4, 32)), 4).flatten(-3, -2)
    return _with_scales(low | (_fields(high, 1) << 4), scale, least, scales)


def _with_scales(q: Tensor, scale: Tensor, least: Tensor, scales: Tensor) -> Tensor:
    """Q4_K's and Q5_K's 8 parts of 32, (..., 8, 32), each with a scale and an offset of 6 bits."""
    first, second, high = _cut(scales, 4, 4, 4)
    steps = torch.cat((first & 63, (high & 15) | ((first >> 2) & 48)), -1).float().mul_(_number(scale))
    offsets = torch.cat((second & 63, (high >> 4) | ((second >> 2) & 48)), -1).float().mul_(_number(least))
    return q.float().mul_(steps[..., None]).sub_(offsets[..., None]).flatten(-2)


def _q6_k(blocks: Tensor) -> Tensor:
    q, high, scales, scale = _cut(blocks, 128, 64, 16, 2)
    low = _fields(q.unflatten(-1, (2, 64)), 4).flatten(-3)
    q = low | (_fields(high.unflatten(-1, (2, 32)), 2).flatten(-3) << 4)
    steps = scales.view(torch.int8).float().mul_(_number(scale))
    return q.float().sub_(32).unflatten(-1, (16, 16)).mul_(steps[..., None]).flatten(-2)


def _iq4_nl(blocks: Tensor) -> Tensor:
    scale, q = _cut(blocks, 2, 16)
    return _looked_up(_fields(q, 4).flatten(-2)).mul_(_number(scale))


def _iq4_xs(blocks: Tensor) -> Tensor:
    scale, high, low, q = _cut(blocks, 2, 2, 4, 128)
    steps = (_in_order(low, 4) | (_in_order(high, 2) << 4)).float().sub_(32).mul_(_number(scale))
    return _looked_up(_fields(q.unflatten(-1, (8, 16)), 4).flatten(-2)).mul_(steps[..., None]).flatten(-2)


def _cut(blocks: Tensor, *sizes: int) -> Any:
    """The parts of every block, of so many bytes each."""
    return blocks.split(sizes, -1)


def _number(halves: Tensor) -> Tensor:
    """Two bytes as a number: (..., 2) -> (..., 1)."""
    return halves.contiguous().view(torch.float16).float()


def _fields(q: Tensor, bits: int) -> Tensor:
    """Bytes as fields of a few bits: (..., K) -> (..., 8 / bits, K), all the lowest first."""
    q = q.contiguous()  # a third less time
    return torch.stack([(q >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -2)


def _in_order(q: Tensor, bits: int) -> Tensor:
    """Bytes as fields of a few bits: (..., K) -> (..., 8 / bits * K), those of the first byte first."""
    return _fields(q, bits).transpose(-1, -2).flatten(-2)


def _looked_up(q: Tensor) -> Tensor:
    return torch.tensor(_IQ4, device=q.device)[q.int()]


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
