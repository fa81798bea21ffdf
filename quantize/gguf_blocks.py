"""Rows of weights to ggml's blocks, in this process, through ggml's own C functions (or `gguf_kernel`).

The bytes are those of `llama_model_quantize`, which calls the same functions. Rows are independent of one another, so
neither the size of a slab nor the number of threads can change a byte. ctypes lets go of the GIL while C works: rows in
slabs over a ThreadPoolExecutor use all cores. It knows no tensors, no files and no recipes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..backends import ggml
from ..backends.ggml import NUMBERS, row_bytes
from ..r1.gguf import TENSOR_TYPES
from .gguf_kernel import quantizer

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]


def block_size(type: str) -> int:
    """How many weights of a row share one block; a row's length has to be a multiple of it."""
    return TENSOR_TYPES[NUMBERS[type]][1]


def bits_per_weight(type: str) -> float:
    """Bits that a weight takes, its share of the scales included."""
    _, block, size = TENSOR_TYPES[NUMBERS[type]]
    return size * 8 / block


def needs_importance(type: str) -> bool:
    """Whether ggml refuses to make this type without an importance matrix."""
    return bool(ggml.library().ggml_quantize_requires_imatrix(NUMBERS[type]))


def quantize(
    type: str, rows: Floats, importance: Floats | None = None, out: Blocks | None = None
) -> Blocks:  # (R, row_bytes)
    """Rows (R, C) in blocks of a type; `importance` (C,) weighs the squared error of each column.

    `out`, a contiguous (R, row_bytes), is filled where it is given. Safe to call from many threads at once.
    """
    count, cols = rows.shape
    size = row_bytes(type, cols)
    rows = np.ascontiguousarray(rows, np.float32)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (cols,):
            raise ValueError(f"importance of shape {importance.shape} for rows of {cols}")
    if out is None:
        out = np.empty((count, size), np.uint8)
    assert out.shape == (count, size) and out.flags.c_contiguous and out.dtype == np.uint8
    fast = quantizer(type, ggml.library(), by_ggml) if importance is None else None
    if fast is None:
        return by_ggml(type, rows, importance, out)
    fast(rows.ctypes.data, out.ctypes.data, rows.size // block_size(type))
    return out


def by_ggml(type: str, rows: Floats, importance: Floats | None = None, out: Blocks | None = None) -> Blocks:
    """The same, and always by ggml's own code."""
    count, cols = rows.shape
    out = np.empty((count, row_bytes(type, cols)), np.uint8) if out is None else out
    if count:
        pointer = None if importance is None else importance.ctypes.data
        make = ggml.library().ggml_quantize_chunk
        written = make(NUMBERS[type], rows.ctypes.data, out.ctypes.data, 0, count, cols, pointer)
        assert written == out.nbytes, f"ggml wrote {written} bytes of {out.nbytes} for {type}"
    return out


def is_valid(type: str, blocks: Blocks) -> bool:
    """Whether ggml finds no NaN and no infinity in these blocks."""
    blocks = np.ascontiguousarray(blocks, np.uint8)
    return bool(ggml.library().ggml_validate_row_data(NUMBERS[type], blocks.ctypes.data, blocks.nbytes))


def library() -> str:
    """The path of the ggml library in use: its bytes decide the last bit of every block."""
    return str(ggml.library()._name)
