"""The models on this disk: the hub's cache folder, read and tidied without importing huggingface_hub.

It knows the cache's layout (`models--org--repo` with `blobs`, `refs` and `snapshots`, which huggingface_hub writes and
other programs share) and how GGUF files are named. It knows nothing of the network. huggingface_hub has functions for
some of this; importing it takes a third of a second, which `list`, and `serve` of a model at hand, need not pay.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_quantization = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d(?:_[0-9KSMLX]+)+|TQ\d_0|MXFP4|NVFP4|BF16|F?P?16|F32))(?=[-._/]|$)", re.IGNORECASE
)
_part = re.compile(r"-\d{5}-of-(\d{5})$")


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One model in the hub's cache."""

    repository: str  # "bartowski/DeepSeek-R1-Distill-Qwen-7B-GGUF"
    title: str  # "DeepSeek-R1-Distill-Qwen-7B-Q8_0", or the repository's name for safetensors
    paths: tuple[Path, ...]  # links in the newest snapshot, first part first
    format: str  # "gguf" | "safetensors"
    quantization: str
    size: int  # bytes


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The hub's cache: what is given, else as huggingface_hub finds it (HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME)."""
    environment = os.environ
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    folder = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(cache_dir or folder)).expanduser()


def repository_folder(cache: Path, repository: str) -> Path:
    """Where a repository's files are kept."""
    return cache / ("models--" + repository.replace("/", "--"))


def quantization_of(name: str) -> str:
    """The label in a file's name, in capitals; "" where there is none.

    >>> quantization_of("DeepSeek-R1-Distill-Qwen-7B-Q4_K_M.gguf")
    'Q4_K_M'
    """
    labels = _quantization.findall(name.removesuffix(".gguf"))
    return labels[-1].upper() if labels else ""


def title_of(name: str) -> str:
    """A GGUF file's name without folder, ending and part number."""
    return _part.sub("", name.rpartition("/")[2].removesuffix(".gguf"))


def gguf_models(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """File names by model, first part first: the parts of a split file together, helpers (mmproj, imatrix) left out."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf") and not re.search(r"mmproj|imatrix", name, re.IGNORECASE):
            models.setdefault(_part.sub("", name[: -len(".gguf")]), []).append(name)
    return {key: tuple(parts) for key, parts in models.items()}


def is_complete(names: tuple[str, ...]) -> bool:
    """Whether all parts of a split model are among these."""
    match = _part.search(names[0].removesuffix(".gguf"))
    return match is None or len(names) == int(match[1])


def snapshot(cache: Path, repository: str) -> tuple[str, dict[str, Path]]:
    """The newest state of a repository on disk: its commit ("" = nothing here) and its files by name."""
    folder = repository_folder(cache, repository)
    commits = [path.name for path in _newest_first(folder / "snapshots")]
    try:
        main = (folder / "refs" / "main").read_text().strip()
    except OSError:
        main = ""
    commit = main if main in commits else commits[0] if commits else ""
    return commit, _files(folder / "snapshots" / commit) if commit else {}


def cached_models(cache: Path) -> list[CachedModel]:
    """Every complete model in the cache, by repository and title."""
    found: dict[tuple[str, str], CachedModel] = {}
    for folder in sorted(cache.glob("models--*--*")):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        for commit in _newest_first(folder / "snapshots"):
            for model in _models_in(repository, _files(commit)):
                found.setdefault((repository, model.title), model)
    return [found[key] for key in sorted(found)]


def _models_in(repository: str, files: dict[str, Path]) -> list[CachedModel]:
    models = [(title_of(names[0]), names, "gguf") for names in gguf_models(files).values() if is_complete(names)]
    weights = tuple(sorted(name for name in files if name.endswith(".safetensors")))
    if weights and "config.json" in files and all(is_complete((name,)) or len(weights) > 1 for name in weights):
        models.append((repository.rpartition("/")[2], weights, "safetensors"))
    return [
        CachedModel(
            repository=repository,
            title=title,
            paths=tuple(files[name] for name in names),
            format=kind,
            quantization=quantization_of(names[0]) if kind == "gguf" else "",
            size=sum(files[name].stat().st_size for name in names),
        )
        for title, names, kind in models
    ]


def unfinished_bytes(cache: Path) -> int:
    """Bytes of interrupted downloads, which a new `pull` goes on with."""
    return sum(path.stat().st_size for path in cache.glob("models--*/blobs/*.incomplete"))


def remove_unfinished(cache: Path) -> int:
    """Delete what interrupted downloads left; bytes freed."""
    freed = unfinished_bytes(cache)
    for path in cache.glob("models--*/blobs/*.incomplete"):
        path.unlink(missing_ok=True)
    return freed


def remove(cache: Path, model: CachedModel) -> int:
    """Delete a model from every snapshot of its repository, and the repository with its last model; bytes freed."""
    folder = repository_folder(cache, model.repository)
    before = _disk_bytes(folder)
    names = {path.name for path in model.paths}
    links = [path for path in (folder / "snapshots").rglob("*") if path.is_file() and path.name in names]
    blobs = {_blob(link) for link in links}
    for link in links:
        link.unlink()
    left = [path for path in (folder / "snapshots").rglob("*") if path.is_file()]
    for blob in blobs - {_blob(link) for link in left}:
        blob.unlink(missing_ok=True)
    if not any(path.name.endswith((".gguf", ".safetensors")) for path in left):
        shutil.rmtree(folder)
        shutil.rmtree(cache / ".locks" / folder.name, ignore_errors=True)
    return before - _disk_bytes(folder)


def _blob(link: Path) -> Path:
    # One step only: a blob may itself be a link into a store that other folders share.
    return Path(os.path.normpath(link.parent / os.readlink(link))) if link.is_symlink() else link


def _disk_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _newest_first(folder: Path) -> list[Path]:
    folders = [path for path in folder.glob("*") if path.is_dir()]
    return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)


def _files(commit: Path) -> dict[str, Path]:
    return {path.relative_to(commit).as_posix(): path for path in sorted(commit.rglob("*")) if path.is_file()}


def size_text(size: float) -> str:
    """Bytes in decimal units, three digits.

    >>> size_text(4_683_073_216)
    '4.68 GB'
    """
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            number = size / step
            return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"
    return f"{size:.0f} bytes"
