"""The header of a safetensors file, read in pure Python and checked against the file's size before a library sees it.

It knows names, types, shapes and places of tensors. It reads no weights and trusts nothing: every length and offset is
compared with what the file has. Source: the format's description in huggingface/safetensors, README.md.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from .errors import BadModelFile
from .gguf import PULL_AGAIN

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 16
BITS = {  # of one value
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64},
    **{"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is, and of what kind."""

    name: str
    dtype: str  # "BF16"
    shape: tuple[int, ...]
    offset: int  # bytes, from the start of the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a safetensors file says of itself."""

    path: Path
    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]  # in the order of their places


def read_safetensors(path: str | Path) -> SafetensorsHeader:
    """Read and check the header of one file; every defect is a `BadModelFile`."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            file_size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(b"version") and file_size < 1024:
                raise BadModelFile(f"{path} is a Git LFS pointer, not the file it points to", "run `git lfs pull`")
            if file_size < 8 or length > file_size - 8:
                what = "is empty" if not file_size else f"has {file_size:,} bytes, less than its header claims"
                raise BadModelFile(f"{path} is no safetensors file, or cut short: it {what}", PULL_AGAIN)
            if length > MAX_HEADER_BYTES:
                raise _damaged(path, f"its header has {length:,} bytes, more than the format allows")
            text = file.read(length)
    except FileNotFoundError:
        raise BadModelFile(f"there is no file {path}", "pull the model again") from None
    except OSError as error:
        raise BadModelFile(f"{path} cannot be read: {error.strerror or error}", "check its permissions") from None
    try:
        told = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON: {str(error)[:80]}") from None
    if not isinstance(told, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = told.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata is not made of texts")
    start = 8 + length
    tensors = sorted((_tensor(path, name, entry, start) for name, entry in told.items()), key=_place)
    place = start
    for tensor in tensors:
        if tensor.offset != place:
            raise _damaged(path, f"the tensor `{_shown(tensor.name)}` is at {tensor.offset:,}, not at {place:,}")
        place += tensor.size
    if place > file_size:
        raise BadModelFile(f"{path} is cut short: it has {file_size:,} of {place:,} bytes", PULL_AGAIN)
    if place < file_size:
        raise _damaged(path, f"{file_size - place:,} bytes at its end belong to no tensor")
    return SafetensorsHeader(path, metadata, tuple(tensors))


def _tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise _damaged(path, f"the entry of `{_shown(name)}` is no object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"the tensor `{_shown(name)}` has the unknown type {_shown(dtype)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the tensor `{_shown(name)}` has no proper shape or place")
    size = math.prod(shape) * BITS[dtype]
    if size % 8 or offsets[1] - offsets[0] != size // 8:
        raise _damaged(path, f"the tensor `{_shown(name)}` has {offsets[1] - offsets[0]:,} bytes for {size // 8:,}")
    return StoredTensor(name, dtype, tuple(shape), start + offsets[0], size // 8)


def _place(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.offset, tensor.size


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 53 for item in value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are there once each."""
    told = dict(pairs)
    if len(told) != len(pairs):
        raise ValueError("a key is there twice")
    return told


def _shown(value: Any) -> str:
    text = str(value)
    return "".join(c if c.isprintable() else "?" for c in text[:60]) + ("…" if len(text) > 60 else "")


def _damaged(path: Path, what: str) -> BadModelFile:
    return BadModelFile(f"{path} is damaged: {what}", "download it again, and from a source you trust")
