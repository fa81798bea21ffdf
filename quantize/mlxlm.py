"""Writes checkpoints as MLX reads them: safetensors with affine blocks, and a config.json that names each layer's grid.

Needs no MLX. Every place is known before the first byte is written, so matrices are quantized by slabs of rows on all
threads and written where they belong; memory does not grow with the model. Embedding, head and all linear layers are
quantized, each with the largest group that its rows allow; what no group fits, and what is no matrix, stays in BF16.
Source of the layout: mlx-lm's `utils.py` (save_model, save_config, load_model).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..r1.errors import UserError
from . import affine
from .affine import Floats, Grid
from .architectures import architecture_of, gguf_name
from .errors import SourceInvalid
from .progress import meter
from .source import Checkpoint

if TYPE_CHECKING:
    from .importance import Importance
    from .job import Options

_SHARD_BYTES = 5 << 30
_SLAB_WEIGHTS = 1 << 20
_type = re.compile(r"mlx-(\d)bit(?:-g(\d+))?")


class Piece(NamedTuple):
    """One tensor of the folder."""

    name: str
    dtype: str  # "U32", "BF16"
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * (4 if self.dtype == "U32" else 2)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the source, and what is made of it."""

    source: str
    grid: Grid | None  # None = it stays as it is, in BF16
    pieces: tuple[Piece, ...]  # the values, or packed weights, scales and biases

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that will be written."""

    entries: tuple[Entry, ...]
    common: Grid  # what config.json says once for all
    weights: int  # of the model
    about: str
    importance: Mapping[str, Floats]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        return 8 * self.size / self.weights


def make_plan(checkpoint: Checkpoint, type: str, options: Options) -> Plan:
    """What a type comes to for a checkpoint. Raises `UserError` and its kinds."""
    architecture_of(checkpoint.config)
    importance = _importance(checkpoint, options)
    found = _type.fullmatch(type)
    if found is None:
        return _mix(checkpoint, options, importance)
    bits, group = int(found[1]), int(found[2] or 64)
    grids = {
        name: affine.grid_for(tensor.matrix[1], bits, group)
        for name, tensor in checkpoint.tensors.items()
        if is_quantizable(name, tensor.shape)
    }
    return plan_of(checkpoint, grids, Grid(bits, group), importance)


def plan_of(
    checkpoint: Checkpoint,
    grids: Mapping[str, Grid | None],
    common: Grid,
    importance: Importance | None = None,
    about: str = "",
) -> Plan:
    """The plan for these grids, by the source's names."""
    tied = checkpoint.config.get("tie_word_embeddings") and "model.embed_tokens.weight" in checkpoint.tensors
    entries: list[Entry] = []
    weights = 0
    for name, tensor in sorted(checkpoint.tensors.items(), key=lambda item: _order(item[0])):
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        weights += tensor.size // {"F32": 4}.get(tensor.dtype, 2)
        grid = grids.get(name)
        entries.append(Entry(name, grid, _pieces(name, tensor.shape, grid)))
    left = [entry.source for entry in entries if entry.source in grids and entry.grid is None]
    if left:
        about += f"{'; ' if about else ''}{left[0]}{f' and {len(left) - 1} more' if len(left) > 1 else ''} left in BF16"
    return Plan(tuple(entries), common, weights, about, importance.values if importance else {})


def write(checkpoint: Checkpoint, plan: Plan, folder: Path, options: Options) -> None:
    """Write weights, index and config into a folder."""
    shards = _shards(plan)
    names = [
        f"model-{n + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        for n in range(len(shards))
    ]
    with meter(f"{folder.name.removesuffix('.partial')}", plan.weights, "weight") as show:
        for name, entries in zip(names, shards, strict=True):
            _write_shard(checkpoint, entries, plan.importance, folder / name, options.threads, show)
    placed = {piece.name: name for name, part in zip(names, shards, strict=True) for e in part for piece in e.pieces}
    _write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": plan.size, "total_parameters": plan.weights},
            "weight_map": dict(sorted(placed.items())),
        },
    )
    _write_json(folder / "config.json", _config(checkpoint, plan))


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the matrix of a linear layer or an embedding."""
    return len(shape) == 2 and name.endswith(".weight")


def _importance(checkpoint: Checkpoint, options: Options) -> Importance | None:
    from . import importance as files

    if options.imatrix is not None:
        return files.read(options.imatrix)
    if options.calibration and not options.dry_run:
        from .analysis import collect_importance

        return collect_importance(checkpoint, options.calibration, threads=options.threads)
    return None


def _mix(checkpoint: Checkpoint, options: Options, importance: Importance | None) -> Plan:
    """The best grids for a size, by predicted KL divergence."""
    from . import sensitivity as files
    from .allocate import allocate

    if not options.target_bits:
        raise UserError(
            "the type mlx is a mix for a size, and no size was asked for",
            "give --target-bpw 4.8 --calibration builtin, or take mlx-4bit",
        )
    if options.sensitivity is not None and options.sensitivity.is_file():
        prices = files.read(options.sensitivity)
    elif options.calibration:
        from .analysis import find_prices

        prices = find_prices(checkpoint, options.calibration, affine.candidates(), importance, threads=options.threads)
        if options.sensitivity is not None:
            files.write(options.sensitivity, prices)
    else:
        raise UserError(
            "a mix for a size needs to know what each matrix is worth",
            "give a text with --calibration (or --calibration builtin), or a --sensitivity file of an earlier run",
        )
    plain = plan_of(checkpoint, {}, Grid(4, 64))
    priced = {entry.source for entry in plain.entries if gguf_name(entry.source) in prices.costs}
    fixed = sum(entry.size for entry in plain.entries if entry.source not in priced)
    chosen = allocate(prices.costs, int(plain.weights * options.target_bits / 8) - fixed)
    grids: dict[str, Grid | None] = {
        name: affine.grid_of(chosen.assignment[str(gguf_name(name))]) for name in sorted(priced)
    }
    return plan_of(checkpoint, grids, Grid(4, 64), importance, f"predicted KL divergence {chosen.kl:.4f}")


def _pieces(name: str, shape: tuple[int, ...], grid: Grid | None) -> tuple[Piece, ...]:
    if grid is None:
        return (Piece(name, "BF16", shape),)
    stem, (rows, columns) = name.removesuffix(".weight"), shape
    small = (rows, columns // grid.group)
    return (
        Piece(name, "U32", (rows, columns * grid.bits // 32)),
        Piece(f"{stem}.scales", "BF16", small),
        Piece(f"{stem}.biases", "BF16", small),
    )


def _order(name: str) -> tuple[int, str]:
    """Layer by layer, as a model reads them."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return (int(found[1]) if found else -1 if "embed" in name else 1 << 30, name)


def _shards(plan: Plan) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in plan.entries:
        if shards[-1] and size + entry.size > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    return shards


def _write_shard(
    checkpoint: Checkpoint,
    entries: list[Entry],
    importance: Mapping[str, Floats],
    path: Path,
    threads: int,
    show: Callable[[int], None],
) -> None:
    """One safetensors file: its header first, then every slab at its place, whichever is ready first."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offsets: dict[str, int] = {}
    end = 0
    for piece in (piece for entry in entries for piece in entry.pieces):
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [end, end + piece.size]}
        offsets[piece.name] = end
        end += piece.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(threads) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.truncate(path, 8 + len(text) + end)
        place = {name: 8 + len(text) + offset for name, offset in offsets.items()}

        def make(slab: tuple[Entry, int, int]) -> None:
            entry, start, stop = slab
            for piece, data in zip(entry.pieces, _made(checkpoint, entry, importance, start, stop), strict=True):
                row_bytes = piece.size // _rows(piece)
                _write_at(file.fileno(), data, place[piece.name] + start * row_bytes)
            show((stop - start) * checkpoint.tensors[entry.source].matrix[1])

        for _ in pool.map(make, _slabs(checkpoint, entries)):
            pass


def _slabs(checkpoint: Checkpoint, entries: list[Entry]) -> Iterator[tuple[Entry, int, int]]:
    for entry in entries:
        rows, columns = checkpoint.tensors[entry.source].matrix
        step = max(1, _SLAB_WEIGHTS // columns)
        for start in range(0, rows, step):
            yield entry, start, min(rows, start + step)


def _made(
    checkpoint: Checkpoint, entry: Entry, importance: Mapping[str, Floats], start: int, stop: int
) -> tuple[np.ndarray, ...]:
    """The bytes of some rows, one array a piece."""
    rows = checkpoint.rows(entry.source, start, stop)
    if not np.isfinite(rows).all():
        raise SourceInvalid(
            f"{entry.source} has values that are no finite numbers", "the checkpoint is damaged: download it again"
        )
    if entry.grid is None:
        return (affine.narrow(rows),)
    return tuple(affine.quantize(rows, entry.grid, importance.get(str(gguf_name(entry.source)))))


def _rows(piece: Piece) -> int:
    return piece.shape[0] if len(piece.shape) > 1 else 1


def _write_at(file: int, data: np.ndarray, offset: int) -> None:
    left = np.ascontiguousarray(data).data.cast("B")
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written


def _config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The source's config.json, with a grid for all and those that differ by name."""
    told: dict[str, Any] = {"group_size": plan.common.group, "bits": plan.common.bits, "mode": "affine"}
    for entry in plan.entries:
        if not is_quantizable(entry.source, checkpoint.tensors[entry.source].shape) or entry.grid == plan.common:
            continue
        layer = entry.source.removesuffix(".weight")
        told[layer] = entry.grid is not None and {"group_size": entry.grid.group, "bits": entry.grid.bits}
    config = {key: value for key, value in checkpoint.config.items() if key not in ("torch_dtype", "dtype")}
    return dict(sorted((config | {"quantization": told, "quantization_config": told, "dtype": "bfloat16"}).items()))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
