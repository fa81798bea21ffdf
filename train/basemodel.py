"""The frozen model under an adapter: a GGUF file as a PyTorch module with exactly the weights that are served.

Quantized weights are expanded once, to the numbers that llama.cpp computes with; so what is trained is what is served.
Also the way back: a copy of the file with other types or changed weights. Knows nothing of adapters or of texts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..r1.errors import BadModelFile, UserError
from ..r1.gguf import Header, read_header

Weights = NDArray[np.float32]

LINEAR = {  # a block's linear layers: the name in a GGUF file -> in transformers
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_HASHED = 4096  # bytes of each tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """What an adapter has to know of the model it is for."""

    architecture: str  # as GGUF calls it
    blocks: int
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model's file and its weights in memory."""

    paths: tuple[Path, ...]
    shape: Shape
    module: nn.Module  # a causal language model of transformers, nothing in it trainable
    parameters: int
    fingerprint: str  # of the weights; an adapter belongs to one


def read_base(paths: tuple[Path, ...], dtype: torch.dtype = torch.float32) -> BaseModel:
    """Load a GGUF model for training. Raises `BadModelFile` or `UserError`."""
    if paths[0].suffix != ".gguf":
        raise UserError(
            f"{paths[0].name} is not a GGUF file, and training starts from what is served",
            "name a GGUF of the model; the adapter can be exported for other formats",
        )
    headers = [read_header(path) for path in paths]
    header = headers[0]
    if header.architecture not in ARCHITECTURES:
        raise UserError(
            f"a {header.architecture or 'nameless'} model cannot be trained; only {', '.join(ARCHITECTURES)} can",
            "all R1 distills are one of these",
        )
    shape = Shape(header.architecture, header.block_count, header.head_counts[0], header.kv_head_counts[0])
    tensors = dict(read_tensors(paths))
    module = _module(header, tensors)
    rotary: Any = module.get_submodule("model.rotary_emb")
    frequencies = rotary.inv_freq
    module.to(dtype)
    rotary.inv_freq = frequencies  # angles in 16 bits would be wrong by more the further a token is
    for name, weights in module.named_parameters():
        if "norm" in name and dtype.itemsize < 4:  # as llama.cpp has them; they are few
            weights.data = weights.data.float()
    missing, unexpected = module.load_state_dict(_state(tensors, shape), strict=False)
    tied = {"lm_head.weight"} if "output.weight" not in tensors else set()
    if unexpected or set(missing) - tied:
        names = ", ".join([*unexpected, *sorted(set(missing) - tied)][:3])
        raise BadModelFile(f"{paths[0].name} does not have the tensors of a {shape.architecture} model: {names}")
    module.tie_weights()  # pyright: ignore[reportCallIssue] - transformers'
    if "rope_freqs.weight" in tensors:  # Llama 3.1's way to reach further; in the file it is a table of divisors
        rotary.inv_freq = rotary.inv_freq / torch.from_numpy(tensors["rope_freqs.weight"])
    module.requires_grad_(False)
    parameters = sum(part.parameters for part in headers)
    return BaseModel(paths, shape, module, parameters, fingerprint(headers))


def read_tensors(paths: tuple[Path, ...]) -> Iterator[tuple[str, Weights]]:
    """Every tensor of a model in float32, as llama.cpp expands it; rows first."""
    gguf = _gguf()
    for path in paths:
        for tensor in gguf.GGUFReader(path).tensors:
            yield str(tensor.name), np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)


def fingerprint(headers: list[Header]) -> str:
    """A hash that tells models apart: of names, shapes, types and the beginning of every tensor."""
    digest = hashlib.sha256()
    for header in headers:
        with header.path.open("rb") as file:
            for tensor in header.tensors:
                digest.update(f"{tensor.name} {tensor.shape} {tensor.type}\n".encode())
                file.seek(header.data_offset + tensor.offset)
                digest.update(file.read(min(_HASHED, tensor.size)))
    return digest.hexdigest()[:16]


def copy_model(
    paths: tuple[Path, ...],
    target: Path,
    kind: Literal["F32", "F16", "BF16"],
    changed: Mapping[str, Weights] | None = None,
) -> None:
    """Write the model once more as one file with float weights; `changed` tensors take the place of theirs.

    The same metadata, vocabulary and template; norms stay in 32 bits. Never half-visible. Raises `UserError` where the
    disk is full.
    """
    gguf = _gguf()
    header = read_header(paths[0])
    reader = gguf.GGUFReader(paths[0])
    partial = target.with_name(target.name + ".partial")
    skipped = {"general.architecture", "general.file_type", "split.no", "split.count", "split.tensors.count"}
    try:
        writer = gguf.GGUFWriter(partial, header.architecture)
        for entry in reader.fields.values():
            if entry.name.startswith("GGUF.") or entry.name in skipped:
                continue
            inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(entry.name, entry.contents(), entry.types[0], inner)
        writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32}[kind])
        for name, weights in read_tensors(paths):
            weights = changed[name] if changed and name in changed else weights
            if weights.ndim == 1 or kind == "F32":
                writer.add_tensor(name, weights.astype(np.float32))
            else:
                stored = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(name, gguf.quants.quantize(weights, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{target} could not be written: {error.strerror}", "make room on the disk") from None


def linear_names(shape: Shape) -> dict[str, str]:
    """Every linear layer inside the blocks: its module in transformers -> its tensor in a GGUF file."""
    return {
        f"model.layers.{block}.{theirs}": f"blk.{block}.{ours}.weight"
        for block in range(shape.blocks)
        for ours, theirs in LINEAR.items()
    }


def to_gguf_rows(weights: Weights, tensor: str, shape: Shape) -> Weights:
    """Rows of a matrix or bias in the order a GGUF file has them: llama's queries and keys pair rotated rows up."""
    heads = _rotated_heads(tensor, shape)
    if not heads:
        return weights
    paired = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(weights.shape))


def from_gguf_rows(weights: Weights, tensor: str, shape: Shape) -> Weights:
    """The way back."""
    heads = _rotated_heads(tensor, shape)
    if not heads:
        return weights
    paired = weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(weights.shape))


def _rotated_heads(tensor: str, shape: Shape) -> int:
    """How many heads a llama's query or key tensor has; 0 for all other tensors, whose rows are as transformers'."""
    if shape.architecture != "llama":
        return 0
    return shape.heads if ".attn_q." in tensor else shape.kv_heads if ".attn_k." in tensor else 0


def _state(tensors: Mapping[str, Weights], shape: Shape) -> dict[str, Tensor]:
    """The tensors of a file under transformers' names."""
    state: dict[str, Tensor] = {}
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for name, weights in tensors.items():
        stem, _, kind = name.rpartition(".")  # "blk.0.attn_q", "weight"
        if stem in whole:
            state[f"{whole[stem]}.{kind}"] = torch.from_numpy(weights)
        elif stem.startswith("blk."):
            _, block, part = stem.split(".")
            theirs = LINEAR.get(part) or _NORMS.get(part) or part
            rows = from_gguf_rows(weights, name, shape)
            state[f"model.layers.{block}.{theirs}.{kind}"] = torch.from_numpy(rows)
        elif stem != "rope_freqs":
            state[name] = torch.from_numpy(weights)
    return state


def _module(header: Header, tensors: Mapping[str, Weights]) -> Any:
    """An empty model of the file's shape."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"training needs transformers: {error}", "pip install 'stillhouse[train]'") from None
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[header.architecture]

    def number(key: str, default: float) -> Any:
        return header.metadata.get(f"{header.architecture}.{key}", default)

    vocabulary, width = tensors["token_embd.weight"].shape
    head = int(number("attention.key_length", width // header.head_counts[0]))
    fields: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["blk.0.ffn_up.weight"].shape[0],
        "num_hidden_layers": header.block_count,
        "num_attention_heads": header.head_counts[0],
        "num_key_value_heads": header.kv_head_counts[0],
        "head_dim": head,
        "max_position_embeddings": header.context_length or 2048,
        "rms_norm_eps": float(number("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(number("rope.freq_base", 10_000.0))},
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_dropout": 0.0,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = getattr(transformers, f"{kind}Config")(**fields)
    with torch.device("cpu"):
        return getattr(transformers, f"{kind}ForCausalLM")(config)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"training needs the package gguf: {error}", "pip install 'stillhouse[train]'") from None
    return gguf
