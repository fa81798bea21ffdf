"""What several tests of quantizing use: llama.cpp's own quantizer, and a file made by ours."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from stillhouse.backends.ggml import NUMBERS
from stillhouse.quantize import gguf, plan, recipes, source, weights
from stillhouse.quantize.container import read_metadata
from stillhouse.r1.gguf import read_header

_LOG: list[str] = []


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, data: object) -> None:
    _LOG.append(text.decode(errors="replace"))


def make(
    folder: Path,
    to: Path,
    recipe_names: Sequence[str],
    importance: Mapping[str, np.ndarray] | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    threads: int = 1,
) -> dict[str, Path]:
    """The files that our writer makes of a checkpoint, by recipe."""
    importance = importance or {}
    found = weights.from_checkpoint(source.open_checkpoint(folder))
    plans = [
        plan.make_plan(
            to / f"{recipe}.gguf",
            recipe,
            found,
            recipes.assign(recipe, found, overrides, has_importance=bool(importance)),
            {"general.quantization_version": 2, "general.file_type": recipes.NUMBERS[recipe]},
        )
        for recipe in recipe_names
    ]
    wanted = gguf.outputs(plans, found, importance)
    gguf.write(wanted, found, importance, threads=threads, resume=False)
    for output in wanted:
        gguf.seal(output, {})
    return {output.plan.recipe: gguf.publish(output) for output in wanted}


def llama_quantize(
    path: Path,
    to: Path,
    recipe: str,
    importance: Mapping[str, np.ndarray] | None = None,
    overrides: Sequence[tuple[str, str]] = (),
) -> Path:
    """The same by `llama_model_quantize`, of a GGUF file."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = recipes.NUMBERS[recipe], 1
    keep: list[object] = []
    if importance:
        array = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for item, (name, values) in zip(array, importance.items(), strict=False):
            values = np.ascontiguousarray(values, np.float32)
            keep.append(values)
            item.name, item.size = name.encode(), values.size
            item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
        keep.append(array)
    if overrides:
        types = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
        for item, (pattern, type) in zip(types, overrides, strict=False):
            item.pattern, item.type = pattern.encode(), NUMBERS[type]
        params.tt_overrides = ctypes.cast(types, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
        keep.append(types)
    _LOG.clear()
    llama_cpp.llama_log_set(_log, None)
    code = llama_cpp.llama_model_quantize(str(path).encode(), str(to).encode(), ctypes.byref(params))
    assert code == 0, "".join(_LOG)
    return to


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A file's tensors by name: type, shape, bytes."""
    header, data = read_header(path), path.read_bytes()
    return {
        t.name: (t.type, t.shape, data[header.data_offset + t.offset : header.data_offset + t.offset + t.size])
        for t in header.tensors
    }


def metadata(path: Path) -> dict[str, bytes]:
    """A file's metadata by key: type and value as they are."""
    return {key: value.data for key, value in read_metadata(read_header(path)).items()}


def importance_for(path: Path) -> dict[str, np.ndarray]:
    """An importance matrix for a file's blocks, skewed as real ones are."""
    random = np.random.default_rng(1)
    return {
        t.name: (random.random(t.shape[0]) ** 4 + 1e-4).astype(np.float32)
        for t in read_header(path).tensors
        if t.name.startswith("blk.") and len(t.shape) == 2
    }
