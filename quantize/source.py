"""A checkpoint on disk: `config.json` and safetensors, whole or in shards, mapped into memory and read by rows.

Nothing is copied until rows are asked for, and those come as 32-bit floats whatever the file has (BF16, F16, F32).
It knows no architecture and no format to write.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..r1.errors import BadModelFile
from ..r1.hub import resolve
from ..r1.safetensors import read_safetensors
from .errors import SourceInvalid

Floats = NDArray[np.float32]

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}  # what can be read, in bytes
FETCH_AGAIN = "it was not copied completely: copy or download it again"
_shard = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_sha256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """Where a tensor lies, and of what kind."""

    name: str  # as Hugging Face calls it: "model.layers.0.mlp.up_proj.weight"
    dtype: str  # "BF16"
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes, from the start of the file
    size: int  # bytes

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; a vector is one row."""
        return (math.prod(self.shape[:-1]), self.shape[-1]) if self.shape else (1, 1)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of weights, and what is known of it without reading it."""

    path: Path
    size: int  # bytes
    modified_ns: int
    expected_sha256: str  # what the hub said; "" = unknown


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's folder: its configuration, its tensors by name, its files."""

    folder: Path
    name: str  # "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", or the folder's
    revision: str  # the hub's commit; "" where it is not from the hub
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    files: tuple[SourceFile, ...]
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows `start` to `stop` of a tensor as floats (R, C); a vector is one row."""
        return to_floats(self.raw(name)[start:stop], self.tensors[name].dtype)

    def rows_at(self, name: str, places: NDArray[np.integer[Any]]) -> Floats:
        """The rows at these places, in this order: (R, C)."""
        return to_floats(self.raw(name)[places], self.tensors[name].dtype)

    def raw(self, name: str) -> NDArray[Any]:
        """A tensor as it lies in its file, rows by columns: uint16 for BF16, else floats."""
        tensor = self.tensors[name]
        kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[tensor.dtype]
        count = tensor.size // WIDTHS[tensor.dtype]
        return np.frombuffer(self._map(tensor.file), kind, count, tensor.offset).reshape(tensor.matrix)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]

    def advise(self, name: str, *, soon: bool) -> None:
        """Tell the system that a tensor is wanted `soon`, or no more: then its pages need not stay mapped."""
        if hasattr(mmap, "MADV_WILLNEED"):
            tensor = self.tensors[name]
            first = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            advice = mmap.MADV_WILLNEED if soon else mmap.MADV_DONTNEED
            self._map(tensor.file).madvise(advice, first, tensor.offset + tensor.size - first)


def to_floats(raw: NDArray[Any], dtype: str) -> Floats:
    """BF16 (as uint16), F16 or F32 as 32-bit floats, in one pass over memory."""
    if dtype == "BF16":
        wide = np.empty(raw.shape, np.uint32)
        np.left_shift(raw, 16, out=wide, dtype=np.uint32)  # the upper half of a float is a BF16
        return wide.view(np.float32)
    return raw.astype(np.float32, copy=False)


def find_checkpoint(name: str, *, offline: bool = False) -> Checkpoint | Path:
    """What a user calls a source: a folder, a GGUF file (given back as a path), or a hub id, then downloaded."""
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return open_checkpoint(path)
    files = resolve(name, offline=offline)
    if files.format == "gguf":
        return files.paths[0]
    repository, _, revision = files.source.removeprefix("hub ").partition("@")
    return open_checkpoint(files.paths[0].parent, name=repository if revision else "", revision=revision)


def open_checkpoint(folder: Path, *, name: str = "", revision: str = "") -> Checkpoint:
    """Read the configuration and every header. Raises `SourceInvalid`."""
    if not folder.is_dir():
        raise SourceInvalid(
            f"there is no folder {folder}", "name a folder with config.json and safetensors, or a hub id"
        )
    config = read_json(folder / "config.json")
    files = _weight_files(folder)
    tensors: dict[str, SourceTensor] = {}
    for path in files:
        for tensor in _read_header(path):
            if tensor.name in tensors:
                raise SourceInvalid(
                    f"{tensor.name} is in {tensors[tensor.name].file.name} and in {path.name}",
                    "two checkpoints lie in this folder: move one away",
                )
            tensors[tensor.name] = tensor
    _check_index(folder, tensors)
    name, revision = (name, revision) if name else _hub_name(folder)
    return Checkpoint(
        folder=folder,
        name=name or folder.resolve().name,
        revision=revision,
        config=config,
        tensors=tensors,
        files=tuple(SourceFile(p, p.stat().st_size, p.stat().st_mtime_ns, _expected_sha256(p)) for p in files),
    )


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file that has to be there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceInvalid(
            f"{path.parent} has no {path.name}", "a checkpoint needs it: copy it from the hub"
        ) from None
    except (OSError, ValueError) as error:
        raise SourceInvalid(f"{path} cannot be read: {error}", FETCH_AGAIN) from None
    if not isinstance(found, dict):
        raise SourceInvalid(f"{path} is not a JSON object", FETCH_AGAIN)
    return found


def hash_files(files: Iterable[SourceFile], stop: Callable[[], bool] = lambda: False) -> dict[str, str]:
    """SHA-256 of whole files, by name; `stop` ends it early. Raises `SourceInvalid` where the hub said another."""
    found = {}
    for file in files:
        digest = hashlib.sha256()
        with file.path.open("rb", buffering=0) as stream:
            while (chunk := stream.read(1 << 20)) and not stop():
                digest.update(chunk)
        if stop():
            break
        found[file.path.name] = digest.hexdigest()
        if file.expected_sha256 and digest.hexdigest() != file.expected_sha256:
            raise SourceInvalid(
                f"{file.path.name} has the SHA-256 {digest.hexdigest()[:12]}… where the hub says "
                f"{file.expected_sha256[:12]}…",
                "its bytes were damaged: delete it and download it again",
            )
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; all shards, or `SourceInvalid`."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map", {})
        if not isinstance(named, dict) or not all(isinstance(n, str) and Path(n).name == n for n in named.values()):
            raise SourceInvalid(f"{index} has no weight_map of file names", FETCH_AGAIN)
        wanted = [folder / name for name in sorted(set(named.values()))]
    else:
        wanted = sorted(folder.glob("*.safetensors"))
        shards = [found for path in wanted if (found := _shard.search(path.name))]
        if shards:
            count = int(shards[0][2])
            stem = wanted[0].name[: _shard.search(wanted[0].name).start()]  # type: ignore[union-attr]
            wanted = [folder / f"{stem}-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        raise SourceInvalid(
            f"the checkpoint has {len(wanted)} files, and {missing[0]} is missing in {folder}"
            + (f" ({len(missing)} are)" if len(missing) > 1 else ""),
            "copy or download what is missing",
        )
    if not wanted:
        torch = next(folder.glob("*.bin"), None)
        hint = f"convert {torch.name} to safetensors first" if torch else "name a folder with safetensors in it"
        raise SourceInvalid(f"{folder} has no safetensors", hint)
    return wanted


def _check_index(folder: Path, tensors: dict[str, SourceTensor]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for name, file in read_json(index)["weight_map"].items():
            if name not in tensors or tensors[name].file.name != file:
                raise SourceInvalid(f"{file} lacks {name}, which {index.name} says it has", FETCH_AGAIN)


def _read_header(path: Path) -> list[SourceTensor]:
    """The tensors of a safetensors file, each checked against the file's size, and of types that can be read."""
    try:
        header = read_safetensors(path)
    except BadModelFile as error:
        raise SourceInvalid(error.message, error.hint) from None
    for tensor in header.tensors:
        if tensor.dtype not in WIDTHS:
            raise SourceInvalid(
                f"{path.name}: {tensor.name} is of the type {tensor.dtype}; BF16, F16 and F32 can be read",
                "an already quantized checkpoint cannot be quantized: take the original one",
            )
    return [SourceTensor(t.name, t.dtype, t.shape, path, t.offset, t.size) for t in header.tensors]


def _hub_name(folder: Path) -> tuple[str, str]:
    """Repository and commit of a folder inside the hub's cache, or two empty texts."""
    parts = folder.resolve().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/"), parts[-1]
    return "", ""


def _expected_sha256(path: Path) -> str:
    """What the hub said a file's SHA-256 is: the name of its blob, or what `hf download --local-dir` noted."""
    if path.is_symlink() and _sha256.fullmatch(name := Path(os.readlink(path)).name):
        return name
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    lines = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
    return lines[1].strip('"') if len(lines) > 1 and _sha256.fullmatch(lines[1].strip('"')) else ""
