"""The header of a GGUF file, read in pure Python and checked against the file's size before any C code sees it.

It knows the container (metadata, tensor names, shapes, types, places) and the few keys that say how much memory a model
takes. It reads no weights, loads no tokenizer, and trusts nothing: every count, length and offset is compared with what
the file has. Source: ggml's docs/gguf.md, gguf.cpp (the rules its own reader applies) and ggml.h (the types).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import BadModelFile
from .gguf_damage import PULL_AGAIN, check_magic, check_version, cut_short, damaged, shown
from .gguf_types import ARRAY, FILE_TYPES, GUESSED, NUMBERS, STRING, TENSOR_TYPES
from .gguf_types import BOOL as BOOL

DEFAULT_ALIGNMENT = 32
MAX_HEADER_BYTES = 1 << 28  # a real one has 2 to 30 MB; more is an attack or a mistake
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # GGML_MAX_NAME, less its final zero
KEPT_STRINGS = 64  # longer arrays (a tokenizer's) are skipped, not read
KEPT_NUMBERS = 1024

_u32, _u64 = struct.Struct("<I"), struct.Struct("<Q")
_numbers = {kind: struct.Struct("<" + code) for kind, code in NUMBERS.items()}
_part = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Skipped:
    """An array too long to be kept: `length` items, in `offset` to `end` of the file."""

    length: int
    offset: int
    end: int


Value = str | int | float | bool | tuple[str | int | float | bool, ...] | Skipped


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is, and of what kind."""

    name: str
    shape: tuple[int, ...]  # ggml's order: the row length first
    type: str  # "Q4_K"
    offset: int  # from the start of the tensor data
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself; numbers that it does not say are 0, texts are empty."""

    path: Path
    file_size: int  # bytes
    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_offset: int  # bytes, where tensor data begins
    architecture: str  # "qwen2", "llama"
    name: str
    quantization: str  # "Q4_K_M"; "" where nothing says it
    parameters: int  # of the tensors in this file
    weights_bytes: int  # of the tensors in this file
    context_length: int  # tokens the model was trained for
    block_count: int
    embedding_length: int
    head_counts: tuple[int, ...]  # one a block
    kv_head_counts: tuple[int, ...]  # one a block
    vocabulary_size: int
    part: int  # from 0
    part_count: int  # 1 = not split

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the model's own chat template."""
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None


class _MoreNeeded(Exception):
    """The header goes on behind the bytes at hand, and the file does too."""


@dataclass(slots=True)
class _Reader:
    """A place in the first bytes of a file."""

    path: Path
    data: bytes
    file_size: int
    position: int = 0

    def take(self, size: int) -> int:
        """Step over `size` bytes that must be there; returns where they begin."""
        start, end = self.position, self.position + size
        if end > self.file_size:
            raise cut_short(self.path, self.file_size, start, size)
        if end > len(self.data):
            raise _MoreNeeded
        self.position = end
        return start

    def number(self, kind: struct.Struct) -> int | float | bool:
        return kind.unpack_from(self.data, self.take(kind.size))[0]

    def u32(self) -> int:
        return int(self.number(_u32))

    def u64(self) -> int:
        return int(self.number(_u64))

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.u64()
        if limit is not None and length > limit:
            raise damaged(self.path, f"the {what} at byte {self.position:,} claims {length:,} bytes, more than {limit}")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise damaged(self.path, f"the {what} at byte {start:,} is not UTF-8 text") from None

    def skip_strings(self, count: int) -> None:
        """Jump over `count` strings; 300,000 take some 20 ms."""
        data, position, unpack = self.data, self.position, _u64.unpack_from
        try:
            for _ in range(count):
                position += 8 + unpack(data, position)[0]
        except (struct.error, OverflowError):
            position += 8  # behind the data: `take` says what that means
        self.take(position - self.position)


def read_header(path: str | Path) -> Header:
    """Read and check the header of one GGUF file; every defect is a `BadModelFile`."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            file_size = file.seek(0, 2)
            limit = 1 << 24
            while True:
                file.seek(0)
                # Plain reads, not mmap: a file that somebody shortens meanwhile would kill the process (SIGBUS).
                data = file.read(min(limit, file_size))
                check_magic(path, data, file_size)
                try:
                    return _parse(_Reader(path, data, file_size), file_size)
                except _MoreNeeded:
                    if limit == MAX_HEADER_BYTES or len(data) < limit:
                        raise damaged(path, f"its header is longer than {len(data):,} bytes") from None
                    limit *= 4
    except FileNotFoundError:
        raise BadModelFile(f"there is no file {path}", "check the path; `stillhouse list` shows what is here") from None
    except IsADirectoryError:
        raise BadModelFile(f"{path} is a folder, not a GGUF file", "name the file inside it") from None
    except OSError as error:
        raise BadModelFile(f"{path} cannot be read: {error.strerror or error}", "check its permissions") from None


def _parse(reader: _Reader, file_size: int) -> Header:
    path = reader.path
    # 1. Version and counts. The smallest value takes 14 bytes, the smallest tensor 32.
    reader.position = 4
    version = reader.u32()
    check_version(path, version)
    tensor_count, value_count = reader.u64(), reader.u64()
    if tensor_count * 32 + value_count * 14 > file_size:
        raise damaged(path, f"it claims {tensor_count:,} tensors and {value_count:,} values in {file_size:,} bytes")

    # 2. Metadata.
    metadata: dict[str, Value] = {}
    for _ in range(value_count):
        key = reader.text("key", 65_535)
        if not key or key in metadata:
            raise damaged(path, f"the key `{shown(key)}` is there twice" if key else "one of its keys is empty")
        metadata[key] = _value(reader, key, reader.u32())
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise damaged(path, f"its alignment is {shown(alignment)}, which is not a power of two")

    # 3. Tensors: ggml wants them one after another, each at a multiple of the alignment.
    tensors: list[TensorInfo] = []
    names: set[str] = set()
    expected = 0
    for _ in range(tensor_count):
        tensor = _tensor(reader)
        if tensor.name in names:
            raise damaged(path, f"the tensor `{shown(tensor.name)}` is there twice")
        if tensor.offset != expected:
            raise damaged(
                path, f"the tensor `{shown(tensor.name)}` is at {tensor.offset:,}, where {expected:,} was expected"
            )
        names.add(tensor.name)
        tensors.append(tensor)
        expected = _aligned(tensor.offset + tensor.size, alignment)
    data_offset = _aligned(reader.position, alignment)
    if tensors:
        needed = data_offset + tensors[-1].offset + tensors[-1].size
        if needed > file_size:
            raise BadModelFile(f"{path} is cut short: it has {file_size:,} of {needed:,} bytes", PULL_AGAIN)
    return _header(path, file_size, version, metadata, tuple(tensors), data_offset)


def _value(reader: _Reader, key: str, kind: int) -> Value:
    if kind == STRING:
        return reader.text(f"value of `{shown(key)}`")
    if kind in _numbers:
        return reader.number(_numbers[kind])
    if kind != ARRAY:
        raise damaged(reader.path, f"the value of `{shown(key)}` has the unknown type {kind}")
    item, length, start = reader.u32(), reader.u64(), reader.position
    if item == STRING:
        if length <= KEPT_STRINGS:
            return tuple(reader.text(f"value of `{shown(key)}`") for _ in range(length))
        if length * 8 > reader.file_size - start:
            raise cut_short(reader.path, reader.file_size, start, length * 8)
        reader.skip_strings(length)
        return Skipped(length, start, reader.position)
    if item not in _numbers:
        what = "an array of arrays" if item == ARRAY else f"an array of the unknown type {item}"
        raise damaged(reader.path, f"the value of `{shown(key)}` is {what}, which llama.cpp does not read")
    reader.take(length * _numbers[item].size)
    if length <= KEPT_NUMBERS:
        return struct.unpack_from(f"<{length}{NUMBERS[item]}", reader.data, start)
    return Skipped(length, start, reader.position)


def _tensor(reader: _Reader) -> TensorInfo:
    path, name = reader.path, reader.text("tensor name", MAX_NAME_BYTES)
    tensor = f"the tensor `{shown(name)}`"
    dimensions = reader.u32()
    if dimensions > MAX_DIMENSIONS:
        raise damaged(path, f"{tensor} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
    shape = tuple(reader.u64() for _ in range(dimensions))
    kind, offset = reader.u32(), reader.u64()
    weights = math.prod(shape)
    if not 0 < weights < 2**63 or max(shape, default=1) >= 2**63:
        raise damaged(path, f"{tensor} has the impossible shape {list(shape)}")
    if kind not in TENSOR_TYPES:
        raise BadModelFile(
            f"{path}: {tensor} has the type {kind}, which this version does not know",
            "a newer stillhouse may know it; a file in Q4_K_M or Q8_0 is safe",
        )
    type_name, block, block_bytes = TENSOR_TYPES[kind]
    if (shape[0] if shape else 1) % block:
        raise damaged(path, f"{tensor} has rows of {shape[0] if shape else 1}, not a multiple of {type_name}'s {block}")
    return TensorInfo(name, shape, type_name, offset, weights // block * block_bytes)


def _header(
    path: Path,
    file_size: int,
    version: int,
    metadata: dict[str, Value],
    tensors: tuple[TensorInfo, ...],
    data_offset: int,
) -> Header:
    facts = _Facts(path, metadata)
    architecture = facts.text("general.architecture")
    blocks = facts.count(f"{architecture}.block_count", 100_000)
    heads = facts.per_block(f"{architecture}.attention.head_count", blocks)
    tokens = metadata.get("tokenizer.ggml.tokens")
    token_count = tokens.length if isinstance(tokens, Skipped) else len(tokens) if isinstance(tokens, tuple) else 0
    part, part_count = facts.count("split.no", 99_999), facts.count("split.count", 99_999)
    file_type = facts.count("general.file_type", 2**32) & ~GUESSED if "general.file_type" in metadata else -1
    return Header(
        path=path,
        file_size=file_size,
        version=version,
        metadata=metadata,
        tensors=tensors,
        data_offset=data_offset,
        architecture=architecture,
        name=facts.text("general.name"),
        quantization=FILE_TYPES.get(file_type) or _commonest_type(tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        weights_bytes=sum(tensor.size for tensor in tensors),
        context_length=facts.count(f"{architecture}.context_length", 2**40),
        block_count=blocks,
        embedding_length=facts.count(f"{architecture}.embedding_length", 2**31),
        head_counts=heads,
        kv_head_counts=facts.per_block(f"{architecture}.attention.head_count_kv", blocks) or heads,
        vocabulary_size=token_count or facts.count(f"{architecture}.vocab_size", 2**31),
        part=part,
        part_count=max(part_count, 1),
    )


@dataclass(frozen=True, slots=True)
class _Facts:
    """Metadata by its expected type; a key that is there with another one is a damaged file."""

    path: Path
    metadata: Mapping[str, Value]

    def text(self, key: str) -> str:
        value = self.metadata.get(key, "")
        if not isinstance(value, str):
            raise damaged(self.path, f"the value of `{key}` is not a text")
        return value

    def count(self, key: str, limit: int) -> int:
        value = self.metadata.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
            raise damaged(self.path, f"the value of `{shown(key)}` is {shown(value)}, not a count up to {limit:,}")
        return value

    def per_block(self, key: str, blocks: int) -> tuple[int, ...]:
        value = self.metadata.get(key)
        if not isinstance(value, tuple):
            return (self.count(key, 2**20),) * blocks if value is not None else ()
        numbers = tuple(n for n in value if isinstance(n, int) and 0 <= n <= 2**20)
        if len(numbers) != len(value) or len(value) < blocks:
            raise damaged(self.path, f"the value of `{shown(key)}` is not a count for each of {blocks} blocks")
        return numbers[:blocks]


def kv_bytes_per_token(header: Header, type_k_bits: float = 16, type_v_bits: float = 16) -> int:
    """Bytes of KV cache that one token takes in all blocks together; q8_0 has 8.5 bits, q4_0 has 4.5."""
    facts = _Facts(header.path, header.metadata)
    attention = f"{header.architecture}.attention"
    heads = max(header.head_counts, default=0)
    if not header.kv_head_counts or not heads:
        raise BadModelFile(
            f"{header.path} does not say how many attention heads it has",
            "it may be an adapter, or a later part of a split file: name the model's first file",
        )
    key_length = facts.count(f"{attention}.key_length", 2**20) or header.embedding_length // heads
    value_length = facts.count(f"{attention}.value_length", 2**20) or header.embedding_length // heads
    bits = sum(header.kv_head_counts) * (key_length * type_k_bits + value_length * type_v_bits)
    return math.ceil(bits / 8)


def has_token(header: Header, token: str) -> bool:
    """Whether the vocabulary has exactly this token."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", ())
    if not isinstance(tokens, Skipped):
        return isinstance(tokens, tuple) and token in tokens
    text = token.encode()
    with header.path.open("rb") as file:
        file.seek(tokens.offset)
        return _u64.pack(len(text)) + text in file.read(tokens.end - tokens.offset)


def split_files(path: str | Path, header: Header) -> tuple[Path, ...]:
    """All parts of a split model, first part first, given any of them; a whole file is its own only part."""
    path = Path(path)
    match = _part.match(path.name)
    if header.part_count == 1 and match is None:
        return (path,)
    if match is None:
        raise BadModelFile(
            f"{path} is part {header.part + 1} of {header.part_count}, but its name does not say so",
            f"give the parts back their names: NAME-{header.part + 1:05}-of-{header.part_count:05}.gguf",
        )
    count, number = int(match["count"]), int(match["number"])
    if header.part_count != max(count, 1) or header.part != number - 1:
        raise BadModelFile(
            f"{path} says it is part {header.part + 1} of {header.part_count}, its name says {number} of {count}",
            "give it back the name it was downloaded with",
        )
    parts = tuple(path.with_name(f"{match['stem']}-{n:05}-of-{match['count']}.gguf") for n in range(1, count + 1))
    for part in parts:
        if not part.is_file():
            raise BadModelFile(
                f"the model has {count} parts, and {part.name} is missing in {part.parent}",
                "download it beside the others, or run `stillhouse pull` again",
            )
    return parts


def _commonest_type(tensors: tuple[TensorInfo, ...]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size
    return max(sizes, key=lambda kind: sizes[kind], default="")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
