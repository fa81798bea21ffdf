"""What every writer reads: metadata and tensors under GGUF's names, from a checkpoint or from a GGUF file.

A tensor gives its rows when asked, as floats or as the bytes it has. It knows no target types.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.ggml import dequantize, row_bytes
from ..r1.gguf import Header, read_header, split_files
from .architectures import (
    Metadata,
    architecture_of,
    gguf_names,
    head_size,
    model_metadata,
    order,
    permutation,
    rope_factors,
)
from .container import read_metadata
from .errors import SourceInvalid
from .gguf_blocks import Blocks, Floats
from .source import Checkpoint, SourceFile
from .vocabulary import Vocabulary, read_vocabulary

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Rows that can be read, from several threads at once; a vector is one row."""

    name: str  # GGUF's
    shape: tuple[int, ...]  # (rows, columns), or (n,)
    type: str  # what it is in the source: "BF16"
    read: Callable[[int, int], Floats]  # rows start to stop -> (R, C)
    read_raw: Callable[[int, int], Blocks]  # the same as they are in the source -> (R, bytes)
    advise: Callable[[bool], None]  # wanted soon, or no more

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return (math.prod(self.shape[:-1]), self.shape[-1])

    @property
    def size(self) -> int:
        """How many weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Weights:
    """A model in GGUF's terms."""

    name: str
    revision: str
    architecture: str
    metadata: Metadata  # of the model, without what a recipe adds
    tensors: tuple[Tensor, ...]  # in llama.cpp's order
    files: tuple[SourceFile, ...]
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: Vocabulary | None  # None = copied from a GGUF file

    @property
    def parameters(self) -> int:
        """All weights together."""
        return sum(tensor.size for tensor in self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by its GGUF name."""
        return next(tensor for tensor in self.tensors if tensor.name == name)


def from_checkpoint(checkpoint: Checkpoint, tokenizer_pre: str = "") -> Weights:
    """A Hugging Face checkpoint in GGUF's terms. Raises `SourceInvalid`."""
    config = checkpoint.config
    architecture = architecture_of(config)
    names = gguf_names(config, checkpoint.tensors)
    tensors = [_from_source(checkpoint, name, hf) for name, hf in names.items()]
    factors = rope_factors(config)
    if factors is not None:
        tensors.append(_constant("rope_freqs.weight", factors))
    tensors.sort(key=lambda tensor: order(tensor.name))
    vocabulary = read_vocabulary(checkpoint.folder, config["vocab_size"], tokenizer_pre)
    network = model_metadata(config)
    _check_shapes(config, {tensor.name: tensor.shape for tensor in tensors})
    parameters = sum(tensor.size for tensor in tensors)
    return Weights(
        name=checkpoint.name,
        revision=checkpoint.revision,
        architecture=architecture.name,
        metadata=general_metadata(checkpoint, architecture.name, parameters) | network | vocabulary.metadata,
        tensors=tuple(tensors),
        files=checkpoint.files,
        blocks=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        vocabulary=vocabulary,
    )


def from_gguf(path: Path, *, allow_requantize: bool = False) -> Weights:
    """A GGUF file (all its parts). Raises `SourceInvalid` where it is quantized already, unless that is allowed."""
    header = read_header(path)
    headers = [read_header(part) for part in split_files(path, header)]
    first = headers[0]
    quantized = [t for h in headers for t in h.tensors if t.type not in FLOATS]
    if quantized and not allow_requantize:
        raise SourceInvalid(
            f"{path.name} is quantized already ({quantized[0].name} is {quantized[0].type}), and twice loses twice",
            "start from the original weights, or say --allow-requantize",
        )
    tensors = [tensor for part in headers for tensor in _from_file(part)]
    metadata: dict[str, Any] = read_metadata(first)
    metadata = {key: value for key, value in metadata.items() if not key.startswith(("split.", "general.alignment"))}
    return Weights(
        name=first.name or path.stem,
        revision="",
        architecture=first.architecture,
        metadata=metadata,
        tensors=tuple(sorted(tensors, key=lambda tensor: order(tensor.name))),
        files=tuple(SourceFile(h.path, h.file_size, h.path.stat().st_mtime_ns, expected_sha256="") for h in headers),
        blocks=first.block_count,
        heads=first.head_counts[0] if first.head_counts else 1,
        kv_heads=first.kv_head_counts[0] if first.kv_head_counts else 1,
        vocabulary=None,
    )


def general_metadata(checkpoint: Checkpoint, architecture: str, parameters: int) -> Metadata:
    """What a file says of its origin, drawn from the model card, the configuration and the name, as llama.cpp does."""
    import gguf

    folder = checkpoint.folder
    card = gguf.Metadata.load_model_card(folder)
    config, named = checkpoint.config, folder.resolve()
    if checkpoint.revision:  # a folder of the hub's cache is called after a commit
        config, named = {**config, "_name_or_path": checkpoint.name}, None
    found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, config, named, parameters)
    found.name = found.name or checkpoint.name
    found.size_label = found.size_label or gguf.size_label(parameters, parameters, 0, 0)
    sampling = gguf.Metadata.load_generation_config(folder)
    for ours, theirs in (("temp", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
        setattr(found, f"sampling_{ours}", sampling.get(theirs))
    found.sampling_penalty_repeat = sampling.get("repetition_penalty")
    collector = gguf.GGUFWriter(None, architecture)
    collector.add_type("model")
    found.set_gguf_meta_model(collector)
    return {key: _plain(entry.value) for key, entry in collector.kv_data[0].items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, bool, int, float)) else list(value)


def _from_source(checkpoint: Checkpoint, name: str, hf: str) -> Tensor:
    source = checkpoint.tensors[hf]
    rows, _ = source.matrix
    places = permutation(checkpoint.config, name, source.shape[0] if source.shape else 1)

    def read_raw(start: int, stop: int) -> Blocks:
        raw = checkpoint.raw(hf)
        part = raw[start:stop] if places is None else raw[places[start:stop]] if rows > 1 else raw[:, places]
        return np.ascontiguousarray(part).view(np.uint8)

    def read(start: int, stop: int) -> Floats:
        if places is None:
            return checkpoint.rows(hf, start, stop)
        return checkpoint.rows_at(hf, places[start:stop]) if rows > 1 else checkpoint.rows(hf, 0, 1)[:, places]

    return Tensor(name, source.shape, source.dtype, read, read_raw, lambda soon: checkpoint.advise(hf, soon=soon))


def _constant(name: str, values: Floats) -> Tensor:
    row = values.reshape(1, -1)
    return Tensor(
        name, values.shape, "F32", lambda a, b: row[a:b], lambda a, b: row[a:b].view(np.uint8), lambda soon: None
    )


def _from_file(header: Header) -> list[Tensor]:
    with header.path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def tensor(name: str, shape: tuple[int, ...], kind: str, offset: int) -> Tensor:
        matrix = (math.prod(shape[:-1]), shape[-1])
        size = row_bytes(kind, matrix[1])

        def read_raw(start: int, stop: int) -> Blocks:
            place = header.data_offset + offset + start * size
            return np.frombuffer(data, np.uint8, (stop - start) * size, place).reshape(stop - start, size)

        def read(start: int, stop: int) -> Floats:
            return dequantize(kind, read_raw(start, stop), matrix[1])

        def advise(soon: bool) -> None:
            if hasattr(mmap, "MADV_WILLNEED"):
                first = (header.data_offset + offset) // mmap.PAGESIZE * mmap.PAGESIZE
                end = header.data_offset + offset + matrix[0] * size
                data.madvise(mmap.MADV_WILLNEED if soon else mmap.MADV_DONTNEED, first, end - first)

        return Tensor(name, shape, kind, read, read_raw, advise)

    return [tensor(t.name, tuple(reversed(t.shape)), t.type, t.offset) for t in header.tensors]


def _check_shapes(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse weights that are not of the shapes that the configuration says."""
    hidden, forward, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = head_size(config)
    queries = head * config["num_attention_heads"]
    keys = head * (config.get("num_key_value_heads") or config["num_attention_heads"])
    wanted = {
        "token_embd": (vocabulary, hidden),
        "output": (vocabulary, hidden),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (forward, hidden),
        "ffn_up": (forward, hidden),
        "ffn_down": (hidden, forward),
    }
    for name, shape in shapes.items():
        expected = wanted.get(name.rpartition(".")[0].rpartition(".")[2])
        if expected and shape not in (expected, expected[:1]):
            raise SourceInvalid(
                f"{name} has the shape {list(shape)} where config.json asks for {list(expected)}",
                "config.json and the weights are of two models",
            )
