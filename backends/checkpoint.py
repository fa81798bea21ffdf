"""A checkpoint folder as a hub has it (config.json, safetensors), checked before a runtime reads any of it.

What can be known to be wrong without a runtime is told here, for PyTorch and MLX alike: missing shards, damaged
headers, unknown architectures, weights that are programs, Python files that would have to run. It loads no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..r1.errors import BadModelFile, UserError
from ..r1.safetensors import StoredTensor, read_safetensors
from .base import LoadOptions

ARCHITECTURES = ("llama", "qwen2", "qwen3")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_part = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_layer = re.compile(r"model\.layers\.(\d+)\.")


class Quantization(NamedTuple):
    """How the weights of a checkpoint were made smaller."""

    method: str  # "mlx", or transformers' name: "bitsandbytes", "torchao", "gptq", "awq", "compressed-tensors"
    bits: int  # of most weights; 0 where nothing says it


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose files are all there and fit together."""

    folder: Path
    weights: tuple[Path, ...]
    config: dict[str, Any]
    weights_bytes: int
    dtype: str  # of most weights that are not quantized: "BF16", "F16", "F32"
    quantization: Quantization | None

    @property
    def model_type(self) -> str:
        """The architecture by transformers' name: "qwen2"."""
        return str(self.config.get("model_type", ""))

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained to read, 0 where nothing says it."""
        return _count(self.config, "max_position_embeddings")

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of one token in all layers together."""
        heads = _count(self.config, "num_attention_heads") or 1
        head = _count(self.config, "head_dim") or _count(self.config, "hidden_size") // heads
        kv_heads = _count(self.config, "num_key_value_heads") or heads
        return 2 * _count(self.config, "num_hidden_layers") * kv_heads * head


def read_checkpoint(paths: Sequence[Path], options: LoadOptions) -> Checkpoint:
    """Read what a folder says of itself, and check that it can be loaded. Raises `BadModelFile` and `UserError`."""
    folder = paths[0].parent
    config = _read_json(folder / "config.json")
    if config is None:
        raise BadModelFile(f"{folder} has no config.json", "pull the whole repository, not only its weights")
    _check_architecture(folder, config, options)
    quantization = _quantization(config)
    if any(path.suffix in PICKLES for path in paths):
        _check_pickle(paths, options)
        size = sum(path.stat().st_size for path in paths)
        return Checkpoint(folder, tuple(paths), config, size, _told_dtype(config), quantization)
    _check_parts(paths)
    tensors = {tensor.name: tensor for path in paths for tensor in read_safetensors(path).tensors}
    _check_index(folder, tensors)
    layers = {int(found[1]) for name in tensors if (found := _layer.match(name))}
    missing = sorted(set(range(_count(config, "num_hidden_layers"))) - layers)
    if missing:
        raise BadModelFile(
            f"{folder.name} has no weights for layer {missing[0]} of {_count(config, 'num_hidden_layers')}",
            "a shard is missing: pull the whole repository again",
        )
    floats: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.dtype in ("BF16", "F16", "F32"):
            floats[tensor.dtype] = floats.get(tensor.dtype, 0) + tensor.size
    dtype = max(floats, key=lambda name: floats[name], default=_told_dtype(config))
    size = sum(tensor.size for tensor in tensors.values())
    return Checkpoint(folder, tuple(paths), config, size, dtype, quantization)


def _check_architecture(folder: Path, config: dict[str, Any], options: LoadOptions) -> None:
    kind = config.get("model_type")
    own_code = config.get("model_file") or (kind not in ARCHITECTURES and config.get("auto_map"))
    if own_code and not options.trust_remote_code:
        file = own_code if isinstance(own_code, str) else next(iter(own_code.values()), "a Python file")
        raise UserError(
            f"{folder.name} brings its own program ({str(file)[:60]}), which would run with all your rights",
            "choose another checkpoint, or read the program, and if you trust it, serve with --trust-remote-code",
        )
    if kind not in ARCHITECTURES and not own_code:
        known = ", ".join(ARCHITECTURES)
        raise BadModelFile(
            f"{folder.name} has the architecture {str(kind)[:40]!r}; checkpoints of {known} can be served",
            "a GGUF file of the model may be served by llama.cpp: stillhouse serve org/repo-GGUF",
        )
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if not _count(config, key) and not own_code:
            raise BadModelFile(f"config.json of {folder.name} does not say its {key}", "download it again")


def _check_pickle(paths: Sequence[Path], options: LoadOptions) -> None:
    if not options.allow_pickle:
        raise UserError(
            f"{paths[0].name} is a pickle: a file that can run any program when it is loaded",
            "look for safetensors of the model; if you trust the source, serve with --allow-pickle --backend pytorch",
        )


def _check_parts(paths: Sequence[Path]) -> None:
    """All parts that the names of some speak of are there."""
    names = {path.name for path in paths}
    for name in names:
        found = _part.fullmatch(name)
        if found is None:
            continue
        wanted = [f"{found['stem']}-{n:05}-of-{found['count']}.safetensors" for n in range(1, int(found["count"]) + 1)]
        missing = [part for part in wanted if part not in names]
        if missing:
            raise BadModelFile(
                f"{paths[0].parent.name} has {len(wanted) - len(missing)} of {len(wanted)} shards; "
                f"{missing[0]} is missing",
                "pull the whole repository again",
            )


def _check_index(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Every tensor that the index speaks of is in one of the shards."""
    index = _read_json(folder / "model.safetensors.index.json")
    placed = (index or {}).get("weight_map", {})
    if not isinstance(placed, dict):
        raise BadModelFile(f"the index of {folder.name} has no weight_map", "download it again")
    for name, file in placed.items():
        if name not in tensors:
            raise BadModelFile(
                f"{folder.name} has no tensor {name[:80]}, which its index expects in {str(file)[:80]}",
                "a shard is missing or of another version: pull the whole repository again",
            )


def _quantization(config: dict[str, Any]) -> Quantization | None:
    told = config.get("quantization_config")
    if isinstance(told, dict) and isinstance(told.get("quant_method"), str):
        bits = _count(told, "bits") or (4 if told.get("load_in_4bit") else 8 if told.get("load_in_8bit") else 0)
        return Quantization(told["quant_method"], bits)
    own = config.get("quantization", told)
    return Quantization("mlx", _count(own, "bits")) if isinstance(own, dict) else None


def _told_dtype(config: dict[str, Any]) -> str:
    told = config.get("dtype", config.get("torch_dtype"))
    return {"float32": "F32", "float16": "F16"}.get(str(told), "BF16")


def _count(told: dict[str, Any], key: str) -> int:
    value = told.get(key)
    return value if type(value) is int and 0 < value < 1 << 40 else 0


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, `None` where there is no such file."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:80]
        raise BadModelFile(f"{path.name} of {path.parent.name} cannot be read: {reason}", "download it again") from None
    if not isinstance(told, dict):
        raise BadModelFile(f"{path.name} of {path.parent.name} holds no JSON object", "download it again")
    return told
