"""The importance matrix of a GGUF file: llama.cpp is watched while it reads.

ggml asks a callback before each operation whether it wants to see the result. Of products with a block's weights the
other factor is looked at: its squares are summed by column. ggml's `ggml_tensor` is no stable interface, so its layout
is checked against this build before it is trusted. Source: llama.cpp's tools/imatrix/imatrix.cpp, ggml/include/ggml.h.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# llama-cpp-python's stubs make every handle optional and every integer a C type.

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp as C
import numpy as np

from ..backends import ggml
from ..backends.open import open_watched
from .importance import Importance, Sums
from .kld import Ids

_F32 = 0


class _Tensor(ctypes.Structure):
    """ggml's `ggml_tensor`."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),  # lengths, the row's first
    ("nb", ctypes.c_size_t * 4),  # steps, bytes
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


@functools.cache
def _ggml() -> tuple[Any, int]:
    """ggml's functions, and the number of its matrix product. Raises `RuntimeError` where a tensor looks different."""
    base = ggml.library()
    base.ggml_op_name.restype, base.ggml_op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    base.ggml_backend_buffer_is_host.restype = ctypes.c_bool
    base.ggml_backend_buffer_is_host.argtypes = [ctypes.c_void_p]
    base.ggml_backend_tensor_get.argtypes = [
        *(ctypes.POINTER(_Tensor), ctypes.c_void_p),
        *(ctypes.c_size_t, ctypes.c_size_t),
    ]
    _check_layout(base)
    return base, next(n for n in range(100) if base.ggml_op_name(n) == b"MUL_MAT")


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _check_layout(base: Any) -> None:
    """Have ggml make a product, and see whether everything is where it is looked for."""
    tensor = ctypes.POINTER(_Tensor)
    base.ggml_init.restype, base.ggml_init.argtypes = ctypes.c_void_p, [_InitParams]
    base.ggml_free.argtypes = [ctypes.c_void_p]
    base.ggml_new_tensor_2d.restype = base.ggml_mul_mat.restype = tensor
    base.ggml_new_tensor_2d.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    base.ggml_mul_mat.argtypes = [ctypes.c_void_p, tensor, tensor]
    base.ggml_set_name.restype, base.ggml_set_name.argtypes = tensor, [tensor, ctypes.c_char_p]
    base.ggml_get_data.restype, base.ggml_get_data.argtypes = ctypes.c_void_p, [tensor]
    context = base.ggml_init(_InitParams(1 << 20, None, False))
    try:
        left, right = base.ggml_new_tensor_2d(context, _F32, 3, 5), base.ggml_new_tensor_2d(context, _F32, 3, 7)
        base.ggml_set_name(left, b"left")
        product = base.ggml_mul_mat(context, left, right).contents
        found = [
            base.ggml_op_name(product.op) == b"MUL_MAT",
            list(product.ne) == [5, 7, 1, 1],
            list(product.nb) == [4, 20, 140, 140],
            product.src[0].contents.name == b"left",
            list(product.src[1].contents.ne) == [3, 7, 1, 1],
            product.src[1].contents.data == base.ggml_get_data(right),
            not product.src[2],
        ]
    finally:
        base.ggml_free(context)
    if not all(found):
        raise RuntimeError(f"this build of ggml lays its tensors out differently ({found})")


def collect(
    path: Path,
    chunks: Ids,
    datasets: tuple[str, ...],
    *,
    threads: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Importance:
    """Have a GGUF model read texts (N, T), and sum the squares of what goes into each of its layers' matrices."""
    sums = Sums()
    scorer = open_watched(path, _watch(sums), threads=threads, context=chunks.shape[1])
    try:
        for chunk in chunks:
            for _ in scorer.logits(chunk.tolist(), 0):  # of every position: else the last layer would skip some
                pass
            progress(1)
    finally:
        scorer.close()
    return sums.importance(datasets, *chunks.shape)


def _watch(sums: Sums) -> Any:
    """ggml's callback. It may not raise: an error in it is only printed, by ctypes."""
    base, product = _ggml()

    @C.ggml_backend_sched_eval_callback
    def see(address: int, asks: bool, _: object) -> bool:
        tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
        if tensor.op != product:
            return not asks
        weights, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = _plain(weights.name.decode())
        wanted = name.startswith("blk.") and name.endswith(".weight") and inputs.type == _F32
        if asks or not wanted:
            return wanted
        columns, rows = inputs.ne[0], inputs.ne[1] * inputs.ne[2] * inputs.ne[3]
        x = np.empty((rows, columns), np.float32)
        if inputs.nb[1] != x.strides[0]:
            return True  # not in one piece: no product with a block's weights is like that
        if base.ggml_backend_buffer_is_host(inputs.buffer):
            ctypes.memmove(x.ctypes.data, inputs.data, x.nbytes)
        else:
            base.ggml_backend_tensor_get(tensor.src[1], x.ctypes.data, 0, x.nbytes)
        sums.add(name, np.einsum("nc,nc->c", x, x, dtype=np.float64, casting="same_kind"), rows)
        return True

    return see


def _plain(name: str) -> str:
    """A tensor's name without what a GPU's copy of it is wrapped in.

    >>> _plain("CUDA0#blk.0.attn_q.weight#0")
    'blk.0.attn_q.weight'
    """
    return name.split("#")[1] if "#" in name else name
