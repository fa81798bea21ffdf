"""A checkpoint folder into memory through mlx-lm: what fits, the weights, an adapter. Knows nothing of requests."""

# pyright: reportMissingModuleSource=false

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..r1.errors import BadModelFile, UserError
from . import machine, memory
from .base import LoadOptions
from .checkpoint import Checkpoint


@contextmanager
def _limits_as_they_are() -> Iterator[None]:
    """mlx-lm lowers the process's limit of open files when it is imported, which a server cannot take back."""
    setrlimit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = setrlimit


with _limits_as_they_are():
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.base import create_attention_mask
    from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache
    from mlx_lm.tuner.lora import LoRALinear
    from mlx_lm.utils import load_adapters, load_model

_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_SAME_AS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


__all__ = ["BatchKVCache", "KVCache", "choose_device", "create_attention_mask", "fit", "load", "mx", "read_lazily"]


def choose_device(options: LoadOptions) -> None:
    """The GPU where there is one, and let it keep as much memory as macOS recommends; `--gpu-layers 0` is the CPU."""
    if options.gpu_layers == 0:
        mx.set_default_device(mx.cpu)
    if mx.default_device() == mx.gpu and "max_recommended_working_set_size" in mx.device_info():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


def fit(
    checkpoint: Checkpoint, options: LoadOptions, *, weights_bytes: int | None = None, kv_share: float = 1.0
) -> memory.Fit:
    """Choose the context and the KV cache, or say why what was asked for cannot be had.

    A rank of a cluster has some of the weights, and a share of every token's keys and values.
    """
    if checkpoint.quantization and checkpoint.quantization.method != "mlx":
        raise UserError(
            f"{checkpoint.folder.name} is quantized by {checkpoint.quantization.method}, which MLX does not run",
            "serve it with --backend pytorch, or take a checkpoint in MLX's format (often named …-4bit)",
        )
    own = _SAME_AS[checkpoint.dtype]
    if options.kv_type not in ("f16", own):
        raise UserError(
            f"MLX keeps keys and values as the model computes them ({own}); --kv-type {options.kv_type} is llama.cpp's",
            "leave --kv-type out",
        )
    need = memory.Need(
        checkpoint.weights_bytes if weights_bytes is None else weights_bytes,
        checkpoint.kv_values_per_token * _BYTES[checkpoint.dtype] * kv_share,
        checkpoint.context_length,
        # Rows are padded to the longest and copied when one comes or goes.
        allowance=0.1,
    )
    free, where = machine.free_memory(), "memory"
    if mx.default_device() == mx.gpu and "max_recommended_working_set_size" in mx.device_info():
        wired = int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory()
        free, where = min((free, where), (wired, "the memory that macOS lets a GPU keep (iogpu.wired_limit_mb)"))
    return memory.fit(need, free, options, where=where)


def load(checkpoint: Checkpoint, options: LoadOptions) -> Any:
    """The model with its adapter. Raises `BadModelFile` in MLX's words."""
    model = read_lazily(checkpoint, options)
    if options.loras:
        _adapt(model, options)
    mx.eval(model.parameters())
    return model


def read_lazily(checkpoint: Checkpoint, options: LoadOptions) -> Any:
    """The model, its weights still in their files. Raises `BadModelFile` in MLX's words."""
    if checkpoint.weights[0].suffix != ".safetensors":
        raise UserError("MLX reads safetensors, not pickles", "serve it with --backend pytorch")
    try:
        model, _ = load_model(checkpoint.folder, lazy=True, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # a missing tensor, a shape that does not fit: it has no family of errors of its own
        raise BadModelFile(
            f"MLX cannot load {checkpoint.folder.name}: {_short(error)}", "download it again, or choose another backend"
        ) from None
    if not all(type(layer) is KVCache for layer in make_prompt_cache(model)):
        raise BadModelFile(
            f"{checkpoint.folder.name} has layers that look back over a window only, which MLX is not served with here",
            "serve a GGUF file of the model through llama.cpp",
        )
    model.eval()
    return model


def _adapt(model: nn.Module, options: LoadOptions) -> None:
    """Put an adapter of mlx-lm's own kind onto the model."""
    if len(options.loras) > 1:
        raise UserError("MLX takes one LoRA adapter", "name one with --lora, or fuse the others into the weights")
    path, scale = next(iter(options.loras))
    if not (path / "adapter_config.json").is_file() or not (path / "adapters.safetensors").is_file():
        raise BadModelFile(
            f"{path} is no MLX adapter: a folder with adapter_config.json and adapters.safetensors",
            "mlx_lm.lora writes such folders; GGUF adapters are for llama.cpp, PEFT's for PyTorch",
        )
    try:
        load_adapters(model, str(path))
    except (ValueError, KeyError, AttributeError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        raise BadModelFile(
            f"MLX cannot load the adapter {path.name}: {_short(error)}", "it must be made for this very model"
        ) from None
    for _, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.scale *= scale


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (" ".join(lines[:2]) or type(error).__name__)[:200]
