"""MLX's affine blocks: groups of 32 or 64 weights with a scale and a bias, searched instead of taken from the extremes.

A weight is read as `scale * q + bias`, q a whole number of 2 to 8 bits. MLX's own quantizer takes scale and bias from a
group's least and largest weight. Here ranges from all of it to two thirds are tried, each refitted by least squares,
and the best one kept: 16 to 30 % less squared error in the same bytes, read by the same kernels. Weighed by an
importance where there is one. It knows arrays only and needs no MLX.
Source of the layout: mlx's `quantize` (backend/cpu/quantized.cpp); values lie in a row as one stream, lowest bit first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sensitivity import Candidate

Floats = NDArray[np.float32]
Halves = NDArray[np.uint16]  # bfloat16

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (64, 32, 128)
_RANGES = 8  # ranges that are tried, from all of a group's to the narrowest
_NARROWEST = 0.65  # of the whole range
_REFITS = 4
_SLAB = 1 << 17  # weights that are worked on at once: they stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Grid:
    """How a matrix is stored."""

    bits: int
    group: int  # weights that share a scale and a bias

    @property
    def name(self) -> str:
        """As a type: "mlx-4bit-g64"."""
        return f"mlx-{self.bits}bit-g{self.group}"

    def fits(self, columns: int) -> bool:
        """Whether rows of this length can be stored so."""
        return columns % self.group == 0

    def size(self, rows: int, columns: int) -> int:
        """Bytes of a matrix."""
        return rows * (columns * self.bits // 8 + columns // self.group * 4)


class Blocks(NamedTuple):
    """A matrix of R rows and C columns as MLX stores it."""

    packed: NDArray[np.uint32]  # (R, C * bits / 32)
    scales: Halves  # (R, C / group)
    biases: Halves  # (R, C / group)


def grid_for(columns: int, bits: int, group: int) -> Grid | None:
    """The grid for rows of this length: with the group that was asked for, a smaller one, or none."""
    return next((Grid(bits, size) for size in (group, 64, 32) if size <= group and columns % size == 0), None)


def quantize(rows: Floats, grid: Grid, importance: Floats | None = None) -> Blocks:
    """Rows (R, C) as blocks; `importance`, (C,), says how much the error of each column matters."""
    count, columns = rows.shape
    groups = columns // grid.group
    weights = None if importance is None else _weights(importance, grid.group)
    parts = [_quantize(part, grid, weights) for part in _slabs(rows.reshape(count, groups, grid.group))]
    packed, scales, biases = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Blocks(packed, scales, biases)


def dequantize(blocks: Blocks, grid: Grid) -> Floats:
    """Blocks as MLX reads them: rows (R, C)."""
    count, groups = blocks.scales.shape
    values = _unpack(blocks.packed, grid.bits).reshape(count, groups, grid.group).astype(np.float32)
    values *= widen(blocks.scales)[..., None]
    values += widen(blocks.biases)[..., None]
    return values.reshape(count, groups * grid.group)


def candidates(bits: Sequence[int] = (3, 4, 5, 6, 8), groups: Sequence[int] = (64, 32)) -> list[Candidate]:
    """Grids as candidates for a mix."""
    return [_candidate(Grid(width, group)) for width in bits for group in groups]


def grid_of(name: str) -> Grid:
    """The grid of a candidate's name.

    >>> grid_of("mlx-4bit-g64")
    Grid(bits=4, group=64)
    """
    _, bits, group = name.split("-")
    return Grid(int(bits.removesuffix("bit")), int(group.removeprefix("g")))


def narrow(values: Floats) -> Halves:
    """32-bit floats to bfloat16, to the nearest, ties to even."""
    whole = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((whole + (0x7FFF + ((whole >> 16) & 1))) >> 16).astype(np.uint16)


def widen(values: Halves) -> Floats:
    """Bfloat16 to 32-bit floats."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def _candidate(grid: Grid) -> Candidate:
    def size(rows: int, columns: int) -> int | None:
        return grid.size(rows, columns) if grid.fits(columns) else None

    def render(rows: Floats, importance: Floats | None) -> Floats:
        return dequantize(quantize(rows, grid, importance), grid)

    return Candidate(grid.name, size, render)


def _slabs(rows: Floats) -> Iterator[Floats]:
    step = max(1, _SLAB // (rows.shape[1] * rows.shape[2]))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _weights(importance: Floats, group: int) -> Floats:
    """Importance by group, (C / group, group), each of mean 1; where a group has none, all count the same."""
    weights = importance.reshape(-1, group).astype(np.float32)
    mean = weights.mean(axis=1, keepdims=True)
    return np.where(mean > 0, weights / np.where(mean > 0, mean, 1), 1).astype(np.float32)


def _quantize(rows: Floats, grid: Grid, weights: Floats | None) -> Blocks:
    """One slab, (R, G, group). Sums go over a group, around its mean: far from zero they would lose their last bits."""
    top = np.float32(2**grid.bits - 1)
    centre = _mean(rows, weights)
    rows = rows - centre[..., None]
    least, most = rows.min(axis=2), rows.max(axis=2)
    sums = _Sums(rows, weights)
    scale, bias = np.zeros_like(least), widen(narrow(centre)) - centre  # where a group has one value only
    found = sums.error(scale, bias, np.zeros_like(rows))
    values = np.empty_like(rows)
    for n in range(_RANGES):
        share = 1 - (1 - _NARROWEST) * n / (_RANGES - 1)
        step = (most - least) * np.float32(share / top)
        start = (most + least) / 2 - top / 2 * step
        for _ in range(_REFITS):
            _round(rows, step, start, top, values)
            step, start = sums.refit(values)
        step, start = widen(narrow(step)), widen(narrow(start + centre)) - centre
        error = sums.error(step, start, values)
        better = error < found
        scale[better], bias[better], found[better] = step[better], start[better], error[better]
    _round(rows, scale, bias, top, values)
    count, groups, group = rows.shape
    return Blocks(_pack(values.reshape(count, groups * group), grid.bits), narrow(scale), narrow(bias + centre))


def _mean(rows: Floats, weights: Floats | None) -> Floats:
    if weights is None:
        return rows.mean(axis=2, dtype=np.float64).astype(np.float32)
    return (np.einsum("rgi,gi->rg", rows, weights, dtype=np.float64) / rows.shape[2]).astype(np.float32)


def _round(rows: Floats, step: Floats, start: Floats, top: np.float32, out: Floats) -> None:
    """The nearest whole numbers, (rows - start) / step, written to `out`."""
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
    np.multiply(rows, inverse[..., None], out=out)
    out -= (start * inverse)[..., None]
    np.rint(out, out=out)
    np.clip(out, 0, top, out=out)


class _Sums:
    """What the least squares of a slab need, summed once: rows (R, G, group), weights (G, group) or none."""

    def __init__(self, rows: Floats, weights: Floats | None) -> None:
        self._rows = rows
        self._weights = weights
        self._weighted = rows if weights is None else rows * weights
        self._mass = np.float64(rows.shape[2])  # weights have mean 1
        self._first = self._weighted.sum(axis=2, dtype=np.float64)
        self._second = np.einsum("rgi,rgi->rg", rows, self._weighted, dtype=np.float64)

    def refit(self, values: Floats) -> tuple[Floats, Floats]:
        """Scale and bias of least squared error for these whole numbers, (R, G) each."""
        self._sum(values)
        spread = self._squares - self._ones * self._ones / self._mass
        cross = self._cross - self._ones * self._first / self._mass
        scale = np.divide(cross, spread, out=np.zeros_like(cross), where=spread > 0)
        return scale.astype(np.float32), ((self._first - scale * self._ones) / self._mass).astype(np.float32)

    def error(self, scale: Floats, bias: Floats, values: Floats) -> NDArray[np.float64]:
        """The squared error of scale and bias with these whole numbers, (R, G)."""
        self._sum(values)
        a, b = scale.astype(np.float64), bias.astype(np.float64)
        straight = self._second - 2 * a * self._cross - 2 * b * self._first
        return straight + a * a * self._squares + 2 * a * b * self._ones + self._mass * b * b

    def _sum(self, values: Floats) -> None:
        if self._weights is None:
            self._ones = values.sum(axis=2, dtype=np.float32).astype(np.float64)
            self._squares = np.einsum("rgi,rgi->rg", values, values).astype(np.float64)
        else:
            self._ones = np.einsum("rgi,gi->rg", values, self._weights).astype(np.float64)
            self._squares = np.einsum("rgi,rgi,gi->rg", values, values, self._weights).astype(np.float64)
        self._cross = np.einsum("rgi,rgi->rg", values, self._weighted).astype(np.float64)


def _pack(values: Floats, bits: int) -> NDArray[np.uint32]:
    """Whole numbers (R, C) as one stream of bits a row, lowest first, in 32-bit words."""
    whole = values.astype(np.uint8)
    if bits == 8:
        return whole.view(np.uint32)
    if bits == 4:
        return (whole[:, ::2] | whole[:, 1::2] << 4).view(np.uint32)
    stream = (whole[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(len(whole), -1), axis=1, bitorder="little").view(np.uint32)


def _unpack(packed: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    stream = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=1, bitorder="little")
    places = (1 << np.arange(bits)).astype(np.uint8)
    return (stream.reshape(len(packed), -1, bits) * places).sum(axis=2, dtype=np.uint8)
