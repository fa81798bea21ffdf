"""GGUF's container: metadata and the list of tensors as bytes, and metadata read back as they are.

The whole header is known before the first weight is read, so it is one value: `encode_header`. Nothing here writes a
file. Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..backends.ggml import NUMBERS as TYPE_NUMBERS
from ..r1.gguf import ARRAY, BOOL, DEFAULT_ALIGNMENT, NUMBERS, STRING, Header

VERSION = 3
U32, I32, F32 = 4, 5, 6
_u32, _u64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Raw:
    """A value as it stood in another file: its type and its bytes."""

    data: bytes


def aligned(position: int) -> int:
    """The next place at which a tensor may begin."""
    return -(-position // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def encode_header(metadata: Mapping[str, Any], tensors: Iterable[tuple[str, tuple[int, ...], str, int]]) -> bytes:
    """Everything before the weights, padding included. A tensor: name, shape (rows first), type, offset.

    Texts become strings, whole numbers u32 (in lists i32), others f32, as llama.cpp's converter writes them.
    """
    entries = list(tensors)
    parts = [b"GGUF", _u32.pack(VERSION), _u64.pack(len(entries)), _u64.pack(len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    for name, shape, type, offset in entries:
        parts += [_text(name), _u32.pack(len(shape)), *(_u64.pack(n) for n in reversed(shape))]
        parts += [_u32.pack(TYPE_NUMBERS[type]), _u64.pack(offset)]
    header = b"".join(parts)
    return header + bytes(aligned(len(header)) - len(header))


def read_metadata(header: Header) -> dict[str, Raw]:
    """The metadata of a file whose header was read and checked, byte for byte."""
    with header.path.open("rb") as file:
        data, found = file.read(header.data_offset), {}
    count, position = _u64.unpack_from(data, 16)[0], 24
    for _ in range(count):
        length = _u64.unpack_from(data, position)[0]
        key = data[position + 8 : position + 8 + length].decode()
        start = position + 8 + length
        position = _behind(data, start + 4, _u32.unpack_from(data, start)[0])
        found[key] = Raw(data[start:position])
    return found


def _behind(data: bytes, position: int, kind: int) -> int:
    """Where a value of this kind ends."""
    if kind == STRING:
        return position + 8 + _u64.unpack_from(data, position)[0]
    if kind == ARRAY:
        item, count = _u32.unpack_from(data, position)[0], _u64.unpack_from(data, position + 4)[0]
        position += 12
        if item != STRING:
            return position + count * struct.calcsize(NUMBERS[item])
        for _ in range(count):
            position += 8 + _u64.unpack_from(data, position)[0]
        return position
    return position + struct.calcsize(NUMBERS[kind])


def _text(text: str) -> bytes:
    data = text.encode()
    return _u64.pack(len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, Raw):
        return value.data
    if isinstance(value, bool):
        return _u32.pack(BOOL) + struct.pack("<?", value)
    if isinstance(value, str):
        return _u32.pack(STRING) + _text(value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    items = list(value)
    if all(isinstance(item, str) for item in items):
        return struct.pack("<IIQ", ARRAY, STRING, len(items)) + b"".join(map(_text, items))
    kind, code = (I32, "i") if all(isinstance(item, int) for item in items) else (F32, "f")
    return struct.pack("<IIQ", ARRAY, kind, len(items)) + struct.pack(f"<{len(items)}{code}", *items)
