"""ggml's own C functions, in this process: the library, and rows of its blocks as the numbers that they stand for.

ctypes lets go of the GIL while C works. Knows nothing of models, tensors and files.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..r1.gguf import TENSOR_TYPES

NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}  # "Q4_K" -> 12


def row_bytes(type: str, cols: int) -> int:
    """Bytes of a row of `cols` weights.

    >>> row_bytes("Q4_K", 256), row_bytes("BF16", 3)
    (144, 6)
    """
    _, block, size = TENSOR_TYPES[NUMBERS[type]]
    if cols % block:
        raise ValueError(f"a row of {cols} is not a multiple of {type}'s {block}")
    return cols // block * size


def dequantize(
    type: str, blocks: NDArray[np.uint8], cols: int, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Blocks (R, row_bytes) as the weights (R, C) that they stand for, as llama.cpp reads them.

    `out`, a contiguous (R, C), is filled where it is given and anything has to be computed: F32 is only looked at.
    """
    blocks = np.ascontiguousarray(blocks, np.uint8).reshape(-1, row_bytes(type, cols))
    if type == "F32":
        return blocks.view(np.float32)
    if out is None:
        out = np.empty((len(blocks), cols), np.float32)
    assert out.shape == (len(blocks), cols) and out.flags.c_contiguous and out.dtype == np.float32
    if len(blocks):
        _to_float(type)(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


@functools.cache
def _to_float(type: str) -> Any:
    name, block, size = TENSOR_TYPES[NUMBERS[type]]
    traits = library().ggml_get_type_traits(NUMBERS[type]).contents
    told = (traits.type_name.decode().lower(), traits.block_size, traits.type_size)
    if told != (name.lower(), block, size) or not traits.to_float:
        raise RuntimeError(f"this build of ggml describes {name} as {told}")
    return traits.to_float


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
def library() -> Any:
    """llama.cpp's `ggml-base`, with the signatures that are used here and in the quantizer."""
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
