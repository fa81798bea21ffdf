"""Writes checkpoints as PyTorch reads them in 4 bits: bitsandbytes' NF4, torchao's int4, in transformers' own format.

The libraries quantize and save; what is ours is what they are asked for, and that what is missing is one line. The
whole model passes through memory in BF16.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..backends.machine import free_memory
from ..r1.cache import size_text
from ..r1.errors import UserError
from .architectures import architecture_of
from .errors import NoRoom
from .source import Checkpoint

if TYPE_CHECKING:
    from .job import Options

_NEEDS = {"nf4": ("bitsandbytes", "bitsandbytes"), "int4": ("torchao", "torchao")}
_BITS = {"nf4": 4.127, "int4": 4.25}  # of a weight, scales included: groups of 64 (scales in 8 bits), groups of 128
_GROUP = 128  # int4's


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written, about."""

    kind: str
    size: int  # bytes, reckoned
    weights: int
    about: str

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        return 8 * self.size / self.weights


def make_plan(checkpoint: Checkpoint, type: str, options: Options) -> Plan:
    """What a type comes to for a checkpoint. Raises `UserError` and its kinds."""
    architecture_of(checkpoint.config)
    module, package = _NEEDS[type]
    if find_spec(module) is None:
        raise UserError(f"{type} is made by {package}, which is not installed", f"pip install {package}")
    if type == "int4" and not torch.cuda.is_available():
        raise UserError(
            "int4 is made by torchao for NVIDIA GPUs, and there is none here", "make nf4, which runs anywhere"
        )
    weights = size = 0
    for name, tensor in checkpoint.tensors.items():
        count = tensor.size // {"F32": 4}.get(tensor.dtype, 2)
        weights += count
        size += int(count * (_BITS[type] / 8 if _is_linear(name, tensor.shape) else 2))
    if 2 * weights > free_memory():
        raise NoRoom(
            f"{type} takes the whole model through memory: {size_text(2 * weights)}, "
            f"and {size_text(free_memory())} are free",
            "close other programs, or make mlx-4bit or a GGUF, which are written in pieces",
        )
    return Plan(type, size, weights, f"by {package}, about")


def write(checkpoint: Checkpoint, plan: Plan, folder: Path, options: Options) -> None:
    """Quantize, and save with transformers."""
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=torch.bfloat16,
            device_map=device,
            quantization_config=_settings(plan.kind, checkpoint),
            local_files_only=True,
        )
        model.save_pretrained(folder)
    except (ImportError, NotImplementedError, RuntimeError, ValueError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{_NEEDS[plan.kind][1]} cannot make {plan.kind} of this model on this machine: {lines[0][:200]}",
            "make mlx-4bit or a GGUF instead",
        ) from None


def _settings(kind: str, checkpoint: Checkpoint) -> Any:
    if kind == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    columns = [tensor.shape[1] for name, tensor in checkpoint.tensors.items() if _is_linear(name, tensor.shape)]
    group = next((size for size in (_GROUP, 64, 32) if all(count % size == 0 for count in columns)), 0)
    if not group:
        raise ValueError("its rows are no multiples of 32")
    layout = Int4PackingFormat.TILE_PACKED_TO_4D
    return transformers.TorchAoConfig(Int4WeightOnlyConfig(group_size=group, int4_packing_format=layout))


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Both leave embedding and head as they are."""
    return len(shape) == 2 and ".layers." in name
