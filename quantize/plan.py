"""A plan: every tensor with its type, its place and its size, before the first byte is written.

`--dry-run` prints it, the writer carries it out, the journal keeps to it. It is a value: the same source, recipe and
metadata give the same plan, and the same plan the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..backends.ggml import row_bytes
from .architectures import Metadata
from .container import aligned, encode_header
from .recipes import Choice
from .weights import Weights

SLAB_WEIGHTS = 1 << 21  # so many are read, quantized and written at once: 8 MB of floats a thread
UNKNOWN = "0" * 64  # stands in a plan for a SHA-256 that is known only at the end
RESERVED = 1024  # characters for what is measured later, so that no byte behind them has to move
QUALITY = "stillhouse.quality"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]  # rows first
    type: str
    offset: int  # bytes, from the start of the tensor data
    size: int  # bytes
    misfit: str  # the type that its rows cannot have; "" = it has the one it was meant to

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; a vector is one row."""
        cols = self.shape[-1]
        return (self.size // row_bytes(self.type, cols), cols)

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Rows from and to, for each slab."""
        rows, cols = self.matrix
        step = max(1, SLAB_WEIGHTS // cols)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


@dataclass(frozen=True, slots=True)
class Plan:
    """A file to write."""

    path: Path
    recipe: str  # "Q4_K_M"
    metadata: Metadata
    entries: tuple[Entry, ...]
    header: bytes  # as long as the real one, in which checksums and quality are filled in

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        last = self.entries[-1]
        return len(self.header) + aligned(last.offset + last.size)

    @property
    def weights(self) -> int:
        """How many weights it holds."""
        return sum(rows * cols for rows, cols in (entry.matrix for entry in self.entries))

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes on average, scales included."""
        return sum(entry.size for entry in self.entries) * 8 / self.weights

    @property
    def misfits(self) -> list[Entry]:
        """Tensors that get another type than the recipe's, since their rows are no multiple of its block."""
        return [entry for entry in self.entries if entry.misfit]

    def place(self, entry: Entry, row: int) -> int:
        """Where a row of a tensor begins in the file."""
        return len(self.header) + entry.offset + row * row_bytes(entry.type, entry.shape[-1])

    def fingerprint(self, weights: Weights, importance: str, library: str) -> str:
        """What has to be the same for half a file to go on: the plan, the source, the importance, ggml's own code."""
        source = [(file.path.name, file.size, file.modified_ns) for file in weights.files]
        told = json.dumps([hashlib.sha256(self.header).hexdigest(), SLAB_WEIGHTS, source, importance, library])
        return hashlib.sha256(told.encode()).hexdigest()

    def finished_header(self, metadata: Metadata) -> bytes:
        """The header with values in the place of those that were unknown. Its length stays."""
        filled = {key: metadata.get(key, value) for key, value in self.metadata.items()}
        header = encode_header(filled, ((e.name, e.shape, e.type, e.offset) for e in self.entries))
        assert len(header) == len(self.header), "a value has another length than the one it was planned with"
        return header


def make_plan(path: Path, recipe: str, weights: Weights, choice: Choice, extra: Metadata) -> Plan:
    """Every offset of a file with these types."""
    entries: list[Entry] = []
    offset = 0
    for tensor in weights.tensors:
        rows, cols = tensor.matrix
        type = choice.types[tensor.name]
        size = rows * row_bytes(type, cols)
        entries.append(Entry(tensor.name, tensor.shape, type, offset, size, choice.misfits.get(tensor.name, "")))
        offset = aligned(offset + size)
    metadata = weights.metadata | extra
    header = encode_header(metadata, ((e.name, e.shape, e.type, e.offset) for e in entries))
    return Plan(path, recipe, metadata, tuple(entries), header)


def reserved(text: str = "{}") -> str:
    """JSON with blanks behind it, up to the room that a plan keeps for it.

    >>> len(reserved('{"kld": 0.01}')) == RESERVED
    True
    """
    if len(text) > RESERVED or not text.isascii():
        raise ValueError(f"{len(text)} characters, where {RESERVED} of ASCII are reserved")
    return text.ljust(RESERVED)
