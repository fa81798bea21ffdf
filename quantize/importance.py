"""The importance matrix: how strongly each input of each weight matrix is used, and llama.cpp's files for it.

A column's importance is the mean of its squared activation over a text's tokens; the quantizer weighs the column's
squared error with it. Collected by `pytorch_importance` from a checkpoint or by `gguf_importance` from a GGUF file;
here are the sums, the files (imatrix.gguf in and out, the older .dat in), and whether a matrix fits a model. Source for
the files: llama.cpp's tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..r1.errors import UserError

Floats = NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True)
class Importance:
    """What is known of a model's activations; tensors by GGUF's name."""

    values: dict[str, Floats]  # (C,) the mean of x^2 of each column
    counts: dict[str, int]  # tokens that it is the mean of
    datasets: tuple[str, ...] = ()  # what was read, in words
    chunks: int = 0
    chunk_size: int = 0  # tokens


@dataclass(slots=True)
class Sums:
    """An importance matrix while it is being collected."""

    squares: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # (C,) sums of x^2
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, squares: NDArray[Any], count: int) -> None:
        """Take the sums of squares (C,) of `count` tokens."""
        if name in self.squares:
            self.squares[name] += squares
        else:
            self.squares[name] = squares.astype(np.float64)
        self.counts[name] = self.counts.get(name, 0) + count

    def importance(self, datasets: tuple[str, ...], chunks: int, chunk_size: int) -> Importance:
        """What has been collected."""
        values = {name: (total / self.counts[name]).astype(np.float32) for name, total in self.squares.items()}
        return Importance(values, dict(self.counts), datasets, chunks, chunk_size)


@dataclass(frozen=True, slots=True)
class Fit:
    """How a matrix fits a model; everything that is not empty is worth a line to the user."""

    missing: tuple[str, ...]  # the model's tensors that it says nothing of: they are quantized without
    unknown: tuple[str, ...]  # its entries that the model has no tensor for
    dead: tuple[str, ...]  # tensors of which some columns were always 0: too few or too uniform texts

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.dead)


def fit(importance: Importance, columns: Mapping[str, int]) -> Fit:
    """Compare with a model's matrices (name -> row length). Raises `UserError` where it is another model's."""
    wrong = [name for name, values in importance.values.items() if columns.get(name, len(values)) != len(values)]
    if wrong:
        raise UserError(
            f"the importance matrix has {len(importance.values[wrong[0]])} columns for {wrong[0]}, and the model has "
            f"{columns[wrong[0]]}",
            "it was made for another model: collect one for this model, or leave --imatrix out",
        )
    known = [name for name in importance.values if name in columns]
    missing = tuple(name for name in columns if name not in importance.values)
    if not known or max(len(missing), len(importance.values) - len(known)) > len(columns) // 2:
        raise UserError(
            f"the importance matrix knows {len(known)} of the model's {len(columns)} matrices",
            "it was made for another model: collect one for this model, or leave --imatrix out",
        )
    return Fit(
        missing=missing,
        unknown=tuple(name for name in importance.values if name not in columns),
        dead=tuple(name for name in known if not importance.values[name].all()),
    )


def write(path: Path, importance: Importance) -> None:
    """Write an imatrix.gguf that llama.cpp's tools read; the file appears when it is whole."""
    import gguf

    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(importance.datasets) or ["unknown"])
    writer.add_uint32("imatrix.chunk_count", importance.chunks)
    writer.add_uint32("imatrix.chunk_size", importance.chunk_size)
    for name, values in sorted(importance.values.items()):
        count = importance.counts[name]
        writer.add_tensor(name + _SUMS, (values * np.float32(count)).reshape(1, -1))
        writer.add_tensor(name + _COUNTS, np.full((1, 1), count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def read(path: Path) -> Importance:
    """Read an imatrix.gguf or a .dat file. Raises `UserError` where it is neither, or its numbers are none."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _read_gguf(path) if is_gguf else _read_dat(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no importance matrix {path}", "name an imatrix.gguf or .dat file") from None
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path.name} is not an importance matrix: {error}", "llama-imatrix or `stillhouse quantize` writes one"
        ) from None
    for name, values in found.values.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise UserError(f"{path.name} has impossible numbers for {name}", "collect it again")
    return found


def _read_gguf(path: Path) -> Importance:
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sums = Sums()
    for name in tensors:
        if not name.endswith(_SUMS):
            continue
        stem = name.removesuffix(_SUMS)
        total, counts = tensors[name].data, tensors[stem + _COUNTS].data
        if total.dtype != np.float32 or counts.dtype != np.float32 or counts.size != 1:
            raise ValueError(f"{stem} is of several matrices or of another type than F32")
        if counts.item() > 0:  # never used: llama.cpp would take 1 for all of it, which is to say nothing
            sums.add(stem, total.reshape(-1), round(counts.item()))
    if not any(name.endswith(_SUMS) for name in tensors):
        raise ValueError("it has no sums")
    datasets = reader.get_field("imatrix.datasets")
    numbers = {key: reader.get_field(f"imatrix.{key}") for key in ("chunk_count", "chunk_size")}
    chunks, size = (int(f.contents()) if f else 0 for f in numbers.values())
    return sums.importance(tuple(datasets.contents()) if datasets else (), chunks, size)


def _read_dat(data: bytes) -> Importance:
    """The older format: i32 entries; of each i32 length, name, i32 calls, i32 values, f32 each; i32 chunks, a name."""
    at = 0

    def number() -> int:
        nonlocal at
        (value,) = struct.unpack_from("<i", data, at)
        at += 4
        return value

    def text() -> str:
        nonlocal at
        length = number()
        if not 0 <= length <= len(data) - at:
            raise ValueError(f"a name of {length} bytes")
        at += length
        return data[at - length : at].decode()

    sums = Sums()
    entries = number()
    if not 0 < entries < 1 << 20:
        raise ValueError(f"it claims {entries} entries")
    for _ in range(entries):
        name, calls, count = text(), number(), number()
        values = np.frombuffer(data, "<f4", count, at) if count > 0 else np.empty(0, np.float32)
        at += values.nbytes
        if calls > 0:
            sums.add(name, values, calls)
    chunks = number() if at < len(data) else 0
    return sums.importance((text(),) if at < len(data) else (), chunks, 0)
