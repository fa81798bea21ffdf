"""An adapter in the formats of others: PEFT's folder, llama.cpp's GGUF, MLX's folder, or merged into the weights.

PEFT's is the one the project keeps; it is also read back. Knows nothing of training.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..r1.errors import UserError
from ..r1.gguf import Header, read_header
from .basemodel import (
    Shape,
    Weights,
    copy_model,
    fingerprint,
    from_gguf_rows,
    linear_names,
    to_gguf_rows,
    written_whole,
)

Format = Literal["gguf-lora", "peft", "mlx", "merged"]
Matrices = dict[str, tuple[Tensor, Tensor]]  # module -> A (rank, in), B (out, rank)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BELONGS = "stillhouse.json"  # the model it is for; PEFT warns of names it does not know in its own file
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Adapter:
    """Weights and what they belong to."""

    matrices: Matrices
    rank: int
    alpha: float
    shape: Shape
    base: str  # the model's file, for people
    fingerprint: str  # of the model's weights

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank


def save_peft(adapter: Adapter, folder: Path) -> None:
    """Write the folder that PEFT's `PeftModel.from_pretrained` reads; whole or not at all."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.matrices}),
    }
    belongs = {"fingerprint": adapter.fingerprint, **asdict(adapter.shape)}
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.matrices.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.detach().float().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.detach().float().cpu().contiguous()

    def fill(partial: Path) -> None:
        (partial / WEIGHTS).write_bytes(_safetensors().save(tensors, metadata={"format": "pt"}))
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / BELONGS).write_text(json.dumps(belongs, indent=2) + "\n", encoding="utf-8")

    replace_folder(folder, fill)


def load_peft(folder: Path) -> Adapter:
    """Read what `save_peft` wrote. Raises `UserError` where there is none or it is not whole."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = _safetensors().load_file(folder / WEIGHTS)
        ours = json.loads((folder / BELONGS).read_text(encoding="utf-8"))
        shape = Shape(ours["architecture"], ours["blocks"], ours["heads"], ours["kv_heads"])
        matrices = {
            name: (tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"])
            for name in linear_names(shape)
        }
    except FileNotFoundError:
        raise UserError(f"there is no adapter in {folder}", "name the folder of a run") from None
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"the adapter in {folder} is damaged or not one of Stillhouse's: {error}") from None
    return Adapter(
        matrices,
        int(config["r"]),
        float(config["lora_alpha"]),
        shape,
        str(config["base_model_name_or_path"]),
        str(ours["fingerprint"]),
    )


def save_gguf(adapter: Adapter, path: Path, *, half: bool = False) -> None:
    """Write the file that llama.cpp reads, for `stillhouse serve --lora`; whole or not at all; `half`: in 16 bits."""
    width = np.float16 if half else np.float32
    with written_whole(path, adapter.shape.architecture) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", adapter.alpha)
        for module, tensor in linear_names(adapter.shape).items():
            a, b = (it.detach().float().cpu().numpy() for it in adapter.matrices[module])
            writer.add_tensor(f"{tensor}.lora_a", np.ascontiguousarray(a, width))
            writer.add_tensor(f"{tensor}.lora_b", to_gguf_rows(b, tensor, adapter.shape).astype(width))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def save_mlx(adapter: Adapter, folder: Path) -> None:
    """Write the folder that mlx-lm's `--adapter-path` reads."""
    keys = sorted({name.split(".", 3)[3] for name in adapter.matrices})  # "self_attn.q_proj"
    config = {
        "fine_tune_type": "lora",
        "num_layers": adapter.shape.blocks,
        "lora_parameters": {"rank": adapter.rank, "scale": adapter.scale, "dropout": 0.0, "keys": keys},
    }
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.matrices.items():
        tensors[f"{name}.lora_a"] = a.detach().float().cpu().T.contiguous()
        tensors[f"{name}.lora_b"] = b.detach().float().cpu().T.contiguous()

    def fill(partial: Path) -> None:
        (partial / "adapters.safetensors").write_bytes(_safetensors().save(tensors))
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    replace_folder(folder, fill)


def save_merged(adapter: Adapter, paths: tuple[Path, ...], path: Path, kind: Literal["F32", "F16"] = "F16") -> None:
    """Write the whole model with the adapter in its weights, as a GGUF file."""
    check_belongs(adapter, [read_header(part) for part in paths])
    wanted = {tensor: module for module, tensor in linear_names(adapter.shape).items()}

    def merge(tensor: str, weights: Weights) -> Weights:
        if tensor not in wanted:
            return weights
        a, b = (it.detach().double().cpu() for it in adapter.matrices[wanted[tensor]])
        rows = torch.from_numpy(from_gguf_rows(weights, tensor, adapter.shape)).double() + adapter.scale * (b @ a)
        return to_gguf_rows(rows.float().numpy(), tensor, adapter.shape)

    copy_model(paths, path, kind, merge)


def check_belongs(adapter: Adapter, headers: list[Header]) -> None:
    """Raise `UserError` if an adapter was made on another model than this one."""
    check_belongs_to(adapter, fingerprint(headers), headers[0].path.name)


def check_belongs_to(adapter: Adapter, mark: str, name: str) -> None:
    """As `check_belongs`, where the model's fingerprint is known already."""
    if adapter.fingerprint != mark:
        raise UserError(
            f"this adapter was trained on {adapter.base}, and {name} has other weights",
            "name the model it was trained on",
        )


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Put a new folder in an old one's place; a crash or a full disk leaves the old one as it was."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    except BaseException as error:  # Ctrl-C, too
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists() and old.exists():
            os.replace(old, folder)
        if isinstance(error, OSError):
            words = error.strerror or str(error)
            raise UserError(f"{folder} could not be written: {words}", "make room; the old one is kept") from None
        raise
    shutil.rmtree(old, ignore_errors=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch as safetensors
    except ImportError as error:
        raise UserError(f"adapters need safetensors: {error}", "pip install 'stillhouse[train]'") from None
    return safetensors
