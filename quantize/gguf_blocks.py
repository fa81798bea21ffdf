"""Rows of weights to ggml's blocks and back, in this process, through ggml's own C functions (or `gguf_kernel`).

The bytes are those of `llama_model_quantize`, which calls the same functions. Rows are independent of one another, so
neither the size of a slab nor the number of threads can change a byte. ctypes lets go of the GIL while C works: rows in
slabs over a ThreadPoolExecutor use all cores. It knows no tensors, no files and no recipes.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..r1.gguf import TENSOR_TYPES
from .gguf_kernel import quantizer

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]

NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}  # "Q4_K" -> 12


def block_size(type: str) -> int:
    """How many weights of a row share one block; a row's length has to be a multiple of it."""
    return TENSOR_TYPES[NUMBERS[type]][1]


def row_bytes(type: str, cols: int) -> int:
    """Bytes of a row of `cols` weights.

    >>> row_bytes("Q4_K", 256), row_bytes("BF16", 3)
    (144, 6)
    """
    _, block, size = TENSOR_TYPES[NUMBERS[type]]
    if cols % block:
        raise ValueError(f"a row of {cols} is not a multiple of {type}'s {block}")
    return cols // block * size


def bits_per_weight(type: str) -> float:
    """Bits that a weight takes, its share of the scales included."""
    _, block, size = TENSOR_TYPES[NUMBERS[type]]
    return size * 8 / block


def needs_importance(type: str) -> bool:
    """Whether ggml refuses to make this type without an importance matrix."""
    return bool(_ggml().ggml_quantize_requires_imatrix(NUMBERS[type]))


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
    fast = quantizer(type, _ggml(), by_ggml) if importance is None else None
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
        written = _ggml().ggml_quantize_chunk(NUMBERS[type], rows.ctypes.data, out.ctypes.data, 0, count, cols, pointer)
        assert written == out.nbytes, f"ggml wrote {written} bytes of {out.nbytes} for {type}"
    return out


def dequantize(type: str, blocks: Blocks, cols: int) -> Floats:
    """Blocks (R, row_bytes) as the weights (R, C) that they stand for, as llama.cpp reads them."""
    size = row_bytes(type, cols)
    blocks = np.ascontiguousarray(blocks, np.uint8).reshape(-1, size)
    if type == "F32":
        return blocks.view(np.float32)
    out = np.empty((len(blocks), cols), np.float32)
    if len(blocks):
        _to_float(type)(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def is_valid(type: str, blocks: Blocks) -> bool:
    """Whether ggml finds no NaN and no infinity in these blocks."""
    blocks = np.ascontiguousarray(blocks, np.uint8)
    return bool(_ggml().ggml_validate_row_data(NUMBERS[type], blocks.ctypes.data, blocks.nbytes))


def library() -> str:
    """The path of the ggml library in use: its bytes decide the last bit of every block."""
    return str(_ggml()._name)


class _Traits(ctypes.Structure):
    """The head of ggml's `ggml_type_traits`; `_to_float` checks that this build's is the same."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


@functools.cache
def _ggml() -> Any:
    import llama_cpp._ctypes_extensions as extensions
    import llama_cpp._ggml as ggml

    base: Any = extensions.load_shared_library("ggml-base", ggml.libggml_base_path)
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    base.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    base.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    base.ggml_validate_row_data.restype = ctypes.c_bool
    base.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    base.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    base.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return base


@functools.cache
def _to_float(type: str) -> Any:
    name, block, size = TENSOR_TYPES[NUMBERS[type]]
    traits = _ggml().ggml_get_type_traits(NUMBERS[type]).contents
    told = (traits.type_name.decode().lower(), traits.block_size, traits.type_size)
    if told != (name.lower(), block, size) or not traits.to_float:
        raise RuntimeError(f"this build of ggml describes {name} as {told}")
    return traits.to_float
