"""The frozen model under an adapter: a GGUF file as a PyTorch module with exactly the weights that are served.

Quantized weights become the numbers that llama.cpp computes with, once, or whenever they are used (`packed.py`); so
what is trained is what is served. Also the way back: a copy of the file with other types or changed weights. Knows
nothing of adapters or of texts.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..backends import ggml
from ..r1.errors import BadModelFile, UserError
from ..r1.gguf import Header, TensorInfo, read_header
from . import packed

Weights = NDArray[np.float32]
Kept = Literal["packed", "f16", "expanded"]  # how the matrices stay in memory
_Number = TypeVar("_Number", np.float32, np.uint8)

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
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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
    dtype: torch.dtype  # that matrices are multiplied in
    parameters: int
    fingerprint: str  # of the weights; an adapter belongs to one


def read_base(paths: tuple[Path, ...], dtype: torch.dtype = torch.float32, weights: Kept = "expanded") -> BaseModel:
    """Load a GGUF model for training; what cannot stay packed is expanded. Raises `BadModelFile` or `UserError`."""
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
    shapes = {tensor.name: tensor.shape for part in headers for tensor in part.tensors}
    module = _module(header, shapes)
    for tensor, rows in read_rows(headers):  # one at a time: nothing is ever there twice
        if tensor.name == "rope_freqs.weight":  # Llama 3.1's way to reach further; a table of divisors
            rotary: Any = module.model.rotary_emb
            rotary.inv_freq = rotary.inv_freq / torch.from_numpy(_expand(tensor, rows))
        elif not _fill(module, tensor, rows, shape, dtype, weights):
            raise BadModelFile(f"{tensor.name} in {paths[0].name} is no tensor of a {shape.architecture} model")
    if "output.weight" not in shapes:
        _tie(module)
    missing = [name for name, it in module.named_parameters() if it.is_meta]
    if missing:
        raise BadModelFile(
            f"{paths[0].name} does not have the tensors of a {shape.architecture} model: {', '.join(missing[:3])}"
        )
    parameters = sum(part.parameters for part in headers)
    return BaseModel(paths, shape, module, dtype, parameters, fingerprint(headers))


def read_rows(headers: Sequence[Header]) -> Iterator[tuple[TensorInfo, NDArray[np.uint8]]]:
    """Every tensor of a model as its file has it: (rows, bytes of a row)."""
    for header in headers:
        with header.path.open("rb") as file:
            for tensor in header.tensors:
                file.seek(header.data_offset + tensor.offset)
                yield tensor, np.fromfile(file, np.uint8, tensor.size).reshape(math.prod(tensor.shape[1:]), -1)


def read_tensors(paths: tuple[Path, ...]) -> Iterator[tuple[str, Weights]]:
    """Every tensor of a model in float32, as llama.cpp expands it; rows first."""
    for tensor, rows in read_rows([read_header(path) for path in paths]):
        yield tensor.name, _expand(tensor, rows)


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
    change: Callable[[str, Weights], Weights] = lambda _, weights: weights,
) -> None:
    """Write the model once more as one file with float weights, each tensor as `change` makes it of name and weights.

    The same metadata, vocabulary and template; norms stay in 32 bits. One tensor is in memory at a time. Never
    half-visible. Raises `UserError` where the disk is full.
    """
    gguf = _gguf()
    headers = [read_header(path) for path in paths]
    reader = gguf.GGUFReader(paths[0])
    wide, stored = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType[kind]
    skipped = {"general.architecture", "general.file_type", "split.no", "split.count", "split.tensors.count"}
    with written_whole(target, headers[0].architecture) as writer:
        for entry in reader.fields.values():
            if entry.name.startswith("GGUF.") or entry.name in skipped:
                continue
            inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(entry.name, entry.contents(), entry.types[0], inner)
        writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32}[kind])
        for tensor in (it for header in headers for it in header.tensors):
            type_ = stored if len(tensor.shape) > 1 else wide
            size = math.prod(tensor.shape) * (4 if type_ == wide else 2)
            writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(np.float32), size, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weights in read_tensors(paths):
            writer.write_tensor_data(gguf.quants.quantize(change(name, weights), stored if weights.ndim > 1 else wide))


@contextmanager
def written_whole(path: Path, architecture: str) -> Iterator[Any]:
    """A `gguf.GGUFWriter` whose file appears under its name when all is in it. Raises `UserError` for a full disk."""
    partial = path.with_name(path.name + ".partial")
    writer = _gguf().GGUFWriter(partial, architecture)
    try:
        yield writer
        size = writer.fout[0].tell()
        writer.close()
        if partial.stat().st_size < size:  # NumPy does not say that the last bytes of a tensor found no room
            raise OSError("it is cut short")
        os.replace(partial, path)
    except OSError as error:
        hint = "make room on the disk; what was there is whole"
        raise UserError(f"{path} could not be written: {error.strerror or error}", hint) from None
    finally:
        with suppress(OSError):
            writer.close()
        partial.unlink(missing_ok=True)


def linear_names(shape: Shape) -> dict[str, str]:
    """Every linear layer inside the blocks: its module in transformers -> its tensor in a GGUF file."""
    return {
        f"model.layers.{block}.{theirs}": f"blk.{block}.{ours}.weight"
        for block in range(shape.blocks)
        for ours, theirs in LINEAR.items()
    }


def to_gguf_rows(weights: NDArray[_Number], tensor: str, shape: Shape) -> NDArray[_Number]:
    """Rows of a matrix or bias in the order a GGUF file has them: llama's queries and keys pair rotated rows up."""
    heads = _rotated_heads(tensor, shape)
    if not heads:
        return weights
    paired = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(weights.shape))


def from_gguf_rows(weights: NDArray[_Number], tensor: str, shape: Shape) -> NDArray[_Number]:
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


def _expand(tensor: TensorInfo, rows: NDArray[np.uint8]) -> Weights:
    """A tensor's bytes as numbers of its shape, rows first."""
    return ggml.dequantize(tensor.type, rows, tensor.shape[0]).reshape(tensor.shape[::-1])


def _fill(
    module: Any, tensor: TensorInfo, rows: NDArray[np.uint8], shape: Shape, dtype: torch.dtype, weights: Kept
) -> bool:
    """Put a file's tensor in its place in the module; whether there is one."""
    name = _name_in_transformers(tensor.name)
    where, _, kind = name.rpartition(".")
    try:
        layer = module.get_submodule(where)
    except AttributeError:
        return False
    if not isinstance(getattr(layer, kind, None), nn.Parameter):
        return False
    if tuple(getattr(layer, kind).shape) != tensor.shape[::-1]:
        raise BadModelFile(f"{tensor.name} has the shape {tensor.shape}, which does not fit the others")
    kept = weights == "f16" or (weights == "packed" and tensor.type in packed.KINDS)
    if kept and len(tensor.shape) == 2:
        matrix = _keep(tensor, from_gguf_rows(rows, tensor.name, shape), dtype, weights)
        is_embedding = isinstance(layer, nn.Embedding)
        module.set_submodule(where, packed.Embedding(matrix) if is_embedding else packed.Linear(matrix, layer))
        return True
    numbers = torch.from_numpy(from_gguf_rows(_expand(tensor, rows), tensor.name, shape))
    is_norm = "norm" in where and dtype.itemsize < 4  # as llama.cpp has them; they are few
    setattr(layer, kind, nn.Parameter(numbers.to(torch.float32 if is_norm else dtype), requires_grad=False))
    return True


def _keep(tensor: TensorInfo, rows: NDArray[np.uint8], dtype: torch.dtype, weights: Kept) -> packed.Matrix:
    """A matrix in the file's own bytes or rounded to 16 bits."""
    if weights == "f16" and tensor.type != "F16":
        halves = torch.from_numpy(_expand(tensor, rows)).half()
        return packed.Matrix(halves.view(torch.uint8), "F16", dtype)
    return packed.Matrix(torch.from_numpy(rows), tensor.type, dtype)


def _tie(module: Any) -> None:
    """Have the embedding be the output matrix, too."""
    embedding = module.model.embed_tokens
    if isinstance(embedding, packed.Embedding):
        module.lm_head = packed.Linear(embedding.matrix, module.lm_head)
    else:
        module.lm_head.weight = embedding.weight


def _name_in_transformers(name: str) -> str:
    """Of a tensor or what would be its name: "blk.0.attn_q.weight" -> "model.layers.0.self_attn.q_proj.weight"."""
    stem, _, kind = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{kind}"
    if not stem.startswith("blk."):
        return name
    _, block, part = stem.split(".", 2)
    return f"model.layers.{block}.{LINEAR.get(part) or _NORMS.get(part) or part}.{kind}"


def _module(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """A model of the file's shape, its weights without memory yet."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"training needs transformers: {error}", "pip install 'stillhouse[train]'") from None
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[header.architecture]

    def number(key: str, default: float) -> Any:
        return header.metadata.get(f"{header.architecture}.{key}", default)

    width, vocabulary = shapes["token_embd.weight"]
    head = int(number("attention.key_length", width // header.head_counts[0]))
    fields: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["blk.0.ffn_up.weight"][1],
        "num_hidden_layers": header.block_count,
        "num_attention_heads": header.head_counts[0],
        "num_key_value_heads": header.kv_head_counts[0],
        "head_dim": head,
        "max_position_embeddings": header.context_length or 2048,
        "rms_norm_eps": float(number("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(number("rope.freq_base", 10_000.0))},
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_dropout": 0.0,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = getattr(transformers, f"{kind}Config")(**fields)
    with torch.device("meta"):
        module = getattr(transformers, f"{kind}ForCausalLM")(config)
    rotary = module.model.rotary_emb
    module.model.rotary_emb = type(rotary)(config)  # angles in f32 whatever the weights are in
    return module


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"training needs the package gguf: {error}", "pip install 'stillhouse[train]'") from None
    return gguf
