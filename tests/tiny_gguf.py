"""GGUF files of a few hundred bytes, right or wrong in any place: what the tests of files and downloads are made of."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U32, BOOL, STRING, ARRAY, U64 = 4, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, value: int | str | bool | Sequence[str] | Sequence[int] | bytes) -> bytes:
    """One metadata entry; `bytes` are taken as they are, type and all."""
    if isinstance(value, bytes):
        return text(key) + value
    if isinstance(value, bool):
        return text(key) + struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", U32, value)
    if isinstance(value, str):
        return text(key) + struct.pack("<I", STRING) + text(value)
    if value and isinstance(value[0], int):
        return text(key) + struct.pack("<IIQ", ARRAY, U32, len(value)) + struct.pack(f"<{len(value)}I", *value)
    items = b"".join(text(str(item)) for item in value)
    return text(key) + struct.pack("<IIQ", ARRAY, STRING, len(value)) + items


def tensor(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    pairs: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: int = 0, version: int = 3, fill: bytes = b"\x01"
) -> bytes:
    """A file of these parts with `data` bytes of weights."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + fill * data


def tiny(name: str = "tiny", fill: bytes = b"\x01", part: int = 0, parts: int = 1, weights: int = 4096) -> bytes:
    """A well-formed model: two blocks, 4 heads of which 2 carry keys and values, 64 wide, and two tensors."""
    pairs = [
        pair("general.architecture", "qwen2"),
        pair("general.name", name),
        pair("general.file_type", 15),
        pair("general.license", "mit"),
        pair("qwen2.block_count", 2),
        pair("qwen2.context_length", 40_960),
        pair("qwen2.embedding_length", 64),
        pair("qwen2.attention.head_count", 4),
        pair("qwen2.attention.head_count_kv", 2),
        pair("tokenizer.ggml.tokens", [f"t{n}" for n in range(100)] + ["<think>", "</think>"]),
        pair("tokenizer.chat_template", "{{ messages }}"),
    ]
    if parts > 1:
        pairs += [pair("split.no", part), pair("split.count", parts)]
    tensors = [tensor("a.weight", (64, 32), 0, 0), tensor("b.weight", (weights,), 0, 64 * 32 * 4)]
    return gguf(pairs, tensors, 64 * 32 * 4 + weights * 4, fill=fill)
